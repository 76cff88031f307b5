"""`python -m appliance` is the command `appliance`."""

import sys

if __name__ == "__main__":
    try:
        from appliance.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before `main` could hear it
        sys.exit(130)
