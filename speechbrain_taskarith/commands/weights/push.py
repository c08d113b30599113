"""`taskarith push`: a folder of weights onto Hugging Face's hub."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import Result
from speechbrain_taskarith.utils.hub.download import HUB_NAME
from speechbrain_taskarith.utils.hub.upload import shared_files

_EXAMPLES = """\
  taskarith push merged/ me/whisper-merged --dry-run
  taskarith push merged/ me/whisper-merged --private
  taskarith push results/merged/CKPT+us me/asr-us --overwrite
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "Upload a merged or edited model to Hugging Face's hub: weights, what "
        "describes the model, and its card README.md; no other file. Log in "
        "by `hf auth login`, or set HF_TOKEN."
    )
    parser = shared.add_verb(
        verbs, "push", summary, _EXAMPLES, run, about=about
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="what merge, apply or edit wrote")
    add("name", metavar="OWNER/NAME", help="the repository, which is made")
    add("--private", action="store_true", help="let only its owner see it")
    add(
        "--overwrite",
        action="store_true",
        help="replace the weights of a repository that holds some",
    )
    add("--dry-run", action="store_true", help="only say what would go up")
    parser.set_defaults(
        remedies={
            **parser.get_default("remedies"),
            "overwrite=True": "--overwrite",
        }
    )


def run(options):
    """Upload, and say where it lies."""
    if not HUB_NAME.fullmatch(options.name):
        raise ValueError(f"{options.name!r}: expected OWNER/NAME on the hub")
    files = shared_files(options.folder)
    data = {"verb": "push", "dry_run": options.dry_run, "files": files}
    if options.dry_run:
        lines = [f"would upload to {options.name}:", *(f"  {f}" for f in files)]
        return Result(lines, {**data, "address": None})
    from speechbrain_taskarith.vectors import push_folder

    address = push_folder(
        options.folder,
        options.name,
        private=options.private or None,
        overwrite=options.overwrite,
    )
    return Result([f"uploaded {address}"], {**data, "address": address})
