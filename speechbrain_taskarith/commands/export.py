"""`taskarith export`: a recogniser as files that run without PyTorch."""

import dataclasses

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import Result

_EXAMPLES = """\
  taskarith export results/model -o device
  taskarith export results/model -o device --dtype int8 --overwrite --json
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "Write a streaming recogniser as ONNX files that run without PyTorch, "
        "with all that their reader has to know. They are compared with the "
        "model before they get their name."
    )
    parser = shared.add_verb(
        verbs, "export", summary, _EXAMPLES, run, [shared.writing()], about
    )
    add = parser.add_argument
    add(
        "folder",
        metavar="FOLDER",
        help="folder with hyperparams.yaml (its key `transcriber`) and "
        "transcriber.ckpt",
    )
    add(
        "--dtype",
        default="fp32",
        metavar="TYPE",
        help="fp32, fp16 or int8: all, half or a quarter of the size (fp32)",
    )
    add("--to", default="onnx", metavar="FORM", help="onnx (onnx)")
    parser.set_defaults(
        remedies={
            **parser.get_default("remedies"),
            "overwrite=True": "--overwrite",
            "dtype='": "--dtype '",
        }
    )


def run(options):
    """Export, and say what was written."""
    from speechbrain_taskarith.transducer.export.exporting import (
        checked_parts,
        export_transducer,
    )

    how = {
        "to": options.to,
        "dtype": options.dtype,
        "overwrite": options.overwrite,
    }
    data = {"verb": "export", "dry_run": options.dry_run}
    if options.dry_run:
        _, graphs, _ = checked_parts(options.folder, options.output, **how)
        files = [f"{name}.onnx" for name in graphs]
        line = f"would write {options.output}: {', '.join(files)}"
        return Result([line], {**data, "files": files})
    report = export_transducer(options.folder, options.output, **how)
    sizes = ", ".join(
        f"{name} {size:.1f}"
        for name, size in report.megabytes.items()
        if name.endswith(".onnx")
    )
    lines = [
        f"wrote {report.folder}, {report.dtype}, "
        f"{sum(report.megabytes.values()):.1f} MB ({sizes})",
        f"  differs from the model by {report.difference:.2g} at most; a step "
        f"of {1000 * report.step_audio:.0f} ms takes "
        f"{1000 * report.step_seconds:.2g} ms on one thread",
    ]
    return Result(lines, {**data, **dataclasses.asdict(report)})
