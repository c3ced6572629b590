"""`python -m miles_plan` is `miles-plan`."""

from miles_plan.cli.app import main

if __name__ == "__main__":
    main()
