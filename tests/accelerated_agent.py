"""An agent whose clock runs faster: every duration is divided by the same number.

`python -m tests.accelerated_agent URL STATE_DIR NAME TOKEN SPEED`
"""

import signal
import sys
from dataclasses import fields
from pathlib import Path

from device_agents.agent import LONG_POLL_S, Agent, AgentSettings
from device_agents.backoff import Backoff
from device_agents.connection import Timeouts
from tests.unit.agent_service import DEVICE

if __name__ == "__main__":
    url, state_dir, name, token, speed = sys.argv[1:]
    patient = Timeouts()
    made = Agent(
        AgentSettings(
            service_url=url,
            state_dir=Path(state_dir),
            token=token,
            name=name,
            long_poll_s=LONG_POLL_S / float(speed),
            timeouts=Timeouts(
                **{x.name: getattr(patient, x.name) / float(speed) for x in fields(Timeouts)}
            ),
        ),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        describe=lambda: DEVICE,
        backoff=lambda: Backoff(
            first_s=Backoff().first_s / float(speed), longest_s=Backoff().longest_s / float(speed)
        ),
    )
    signal.signal(signal.SIGTERM, lambda *_: made.stop())
    made.run()
