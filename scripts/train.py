"""`lord-tune train` for launchers: accelerate launch scripts/train.py --config RECIPE.yaml [--key value ...]"""

import sys

from lord_tune.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
