# The names of the room `transducer` that recipes and outside code rely on.
# Arguments may be added, with defaults; nothing here may be renamed.
def transducer_loss(
    logits,
    targets,
    input_lens,
    target_lens,
    blank_index,
    reduction="mean",
    backend="auto",
): ...
def joint_transducer_loss(
    joint,
    encoder_out,
    predictor_out,
    targets,
    input_lens,
    target_lens,
    blank_index,
    reduction="mean",
    memory_budget=268435456,
): ...
def min_wer_loss(log_probs, errors, mask=None): ...
def export_transducer(folder, output, *, to="onnx", dtype="fp32"): ...
def transfer_encoder(checkpoint, encoder, *, prefix="", strict=True): ...

class RNNTJoint:
    def __init__(self, encoder_dim, predictor_dim, joint_dim, vocab_size): ...
    def forward(self, encoder_out, predictor_out): ...
    def internal_lm(self, predictor_out): ...

class HATJoint:
    def __init__(
        self, encoder_dim, predictor_dim, joint_dim, vocab_size, blank_index
    ): ...
    def forward(self, encoder_out, predictor_out): ...
    def internal_lm(self, predictor_out): ...

class HATOutput:
    def __init__(self, input_size, vocab_size, blank_index): ...

class MinWERLoss:
    def __init__(self, searcher, n_best=4, rnnt_weight=0.1, source="beam"): ...
    def statistics(self): ...

class TransducerBeamSearch:
    def __init__(
        self,
        predictor,
        joint,
        blank_index,
        beam_size=4,
        n_best=1,
        lm=None,
        ilm_weight=0.0,
    ): ...
    def forward(self, encoder_out, lens=None): ...

class Emformer:
    def __init__(
        self,
        input_dim,
        num_heads,
        ffn_dim,
        num_layers,
        segment_length,
        right_context,
        left_context,
        memory_size=0,
    ): ...
    def forward(self, x, lens): ...
    def forward_streaming(self, chunk, context): ...
    def make_streaming_context(self, batch): ...

class TransferReport: ...

class StreamingTransducer:
    def stream(self): ...
    def transcribe(self, wave): ...
    def latency(self): ...
