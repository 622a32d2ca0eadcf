"""From a trained model to compressed artifacts: the only package that computes with torch.

`source` loads the model, `inventory` sees its layer groups, `calibration` its ranges;
`compressor` builds the artifact of a candidate and `accuracy` judges it. Measuring an
artifact on a device is `device_agents`' work, choosing candidates is `autotune.search`'s.
"""
