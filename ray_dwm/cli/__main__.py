"""`python -m ray_dwm.cli ...`: the same as `ray-dwm ...`."""

from ray_dwm.cli import main

if __name__ == "__main__":
    main()
