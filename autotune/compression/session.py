"""A model in onnxruntime on this machine, to compute with: the one way of this package.

Owns how it is opened (the CPU provider with default options, as a plain deployment has it) and
the translation of what onnxruntime raises, which shares no public base class: nobody else has to
catch everything. How a device runs an artifact is `device_agents/runtimes/`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from autotune.errors import CompressionError

BATCH = 16
"""Samples that are run at once, where there are many."""


class Session:
    """A loaded model.

    Args:
        model: the ONNX file.
        threads: how many compute one inference.
        what: what the model is called in messages.

    Raises:
        CompressionError: onnxruntime refuses the model.
    """

    def __init__(self, model: bytes, *, threads: int = 1, what: str = "the model") -> None:
        self._what = what
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised, and what is only tried may fail
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise self._refusal(error) from error

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> list[Any]:
        """The outputs of those names, or all; an array each, or what else the model makes.

        Raises:
            CompressionError: onnxruntime cannot run the model on these inputs.
        """
        try:
            found: list[Any] = self._session.run(outputs, dict(inputs))
        except Exception as error:
            raise self._refusal(error) from error
        return found

    def answers(self, x: np.ndarray) -> np.ndarray:
        """The first output over samples of shape `(n, ...)`, float32, `BATCH` of them at once.

        Raises:
            CompressionError: onnxruntime cannot run the model on them.
        """
        name = self._session.get_inputs()[0].name
        starts = range(0, len(x), BATCH)
        batches = (np.ascontiguousarray(x[i : i + BATCH], dtype=np.float32) for i in starts)
        return np.concatenate([self.run({name: batch})[0] for batch in batches])

    def _refusal(self, error: Exception) -> CompressionError:
        return CompressionError(f"onnxruntime cannot run {self._what}: {error}")
