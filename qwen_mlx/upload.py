"""`python -m qwen_mlx.upload --path FOLDER --upload-repo ORG/NAME`: publish a converted model on the hub."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_mlx.cli import Parser, run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="qwen-mlx upload", description="Publish a converted model on the hub.")
    add = parser.add_argument
    add("--path", required=True, metavar="FOLDER", help="the folder that the conversion wrote")
    add("--upload-repo", required=True, metavar="ORG/NAME", help="the repository; made when there is none")
    add("--private", action="store_true", help="make a repository that only you and your organization see")
    add("--allow-unverified", action="store_true", help="publish a model that was not compared with its source, too")
    add("--dry-run", action="store_true", help="list what would be uploaded; contacts nobody")
    args = parser.parse_args(arguments)

    # Late, so that the help needs no MLX.
    from qwen_mlx.convert.upload import upload

    upload(
        Path(os.path.expanduser(args.path)),
        args.upload_repo,
        private=args.private,
        allow_unverified=args.allow_unverified,
        dry_run=args.dry_run,
    )


if __name__ == "__main__":
    sys.exit(run(main))
