"""Pre-trains a Llama: `accelerate launch train/pretrain.py --config train/configs/tiny.yaml key=value ...`.

Run the same command again to go on from the newest checkpoint. SIGTERM and Ctrl-C save first (exit 143, 130).
"""

import argparse

from openllama import cli


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="YAML file of openllama/training/config.py's TrainConfig"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args()
    from openllama.training.faults import stop_with_launcher

    stop_with_launcher()  # before the imports that take seconds
    from openllama.config import load
    from openllama.training.config import TrainConfig
    from openllama.training.loop import Trainer

    return Trainer(load(TrainConfig, args.config, args.overrides)).run()


if __name__ == "__main__":
    cli.run(main)
