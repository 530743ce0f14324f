"""`python -m orchestrator -c disagg-config.yml`, the same as `disaggregated -c disagg-config.yml`."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
