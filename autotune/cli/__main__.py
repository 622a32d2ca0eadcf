"""`python -m autotune.cli`: the command line without its installed script."""

from autotune.cli.root import main

if __name__ == "__main__":
    main()
