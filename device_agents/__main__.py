"""`python -m device_agents`: the same commands as `autotune-agent`."""

from device_agents.cli import main

if __name__ == "__main__":
    main(prog_name="autotune-agent")
