"""The verbs of the command line.

A verb's module has `add_parser(verbs)`, or `add_<verb>(verbs)` where it holds
two; the parser's default `run` takes the options and returns an
`output.Result`. What needs torch is imported inside that function.
"""

# The verb, the file it is in, and the line that `taskarith --help` shows.
VERBS = {
    "vector": (
        "weights.vector",
        "store what fine-tuning added: fine-tuned - base",
    ),
    "apply": ("weights.apply", "edit weights: base + scale * vectors"),
    "syn2real": (
        "weights.syn2real",
        "a domain without recordings: add what real speech adds elsewhere",
    ),
    "merge": (
        "weights.merge",
        "merge many checkpoints, streamed in bounded memory",
    ),
    "rules": (
        "weights.rules",
        "list the merging rules, with arguments and papers",
    ),
    "edit": (
        "weights.edit",
        "a folder of edits: learn, undo, redo, reorder, log, export",
    ),
    "inspect": ("weights.inspect", "show what a file or folder holds"),
    "plot": (
        "weights.inspect",
        "draw cosine matrix or norms by layer of vectors",
    ),
    "push": ("weights.push", "share a folder of weights on the hub"),
    "fragments": ("fragments", "YAML fragments: list, show, copy"),
    "transcribe": ("transcribe", "recordings to text, whole or as a stream"),
    "export": ("export", "a streaming recogniser as ONNX, for devices"),
    "translate": ("translate", "recordings to text of another language"),
}
