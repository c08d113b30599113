from .export.exporting import ExportReport as ExportReport
from .export.exporting import export_transducer as export_transducer
from .joints.chunked_loss import joint_transducer_loss as joint_transducer_loss
from .joints.chunked_loss import sequence_log_prob as sequence_log_prob
from .joints.hat import HATJoint as HATJoint
from .joints.hat import HATOutput as HATOutput
from .joints.joint import RNNTJoint as RNNTJoint
from .joints.speechbrain_joint import SpeechBrainJoint as SpeechBrainJoint
from .loss.lattice import alignment_windows as alignment_windows
from .loss.lattice import lattice_log_prob as lattice_log_prob
from .loss.transducer_loss import transducer_loss as transducer_loss
from .predictor import LSTMPredictor as LSTMPredictor
from .predictor import SpeechBrainPredictor as SpeechBrainPredictor
from .search.beam import TransducerBeamSearch as TransducerBeamSearch
from .search.greedy import TransducerGreedySearch as TransducerGreedySearch
from .search.greedy import TransducerSampler as TransducerSampler
from .search.searcher import Hypothesis as Hypothesis
from .search.searcher import SearchResult as SearchResult
from .streaming.chunked_encoder import ChunkedEncoder as ChunkedEncoder
from .streaming.emformer import Emformer as Emformer
from .streaming.frontend import LocalFbank as LocalFbank
from .streaming.frontend import TimeReduction as TimeReduction
from .streaming.streaming_transducer import PartialResult as PartialResult
from .streaming.streaming_transducer import (
    StreamingTransducer as StreamingTransducer,
)
from .streaming.text import LabelText as LabelText
from .streaming.text import SentencePieceText as SentencePieceText
from .training.expected_errors import min_wer_loss as min_wer_loss
from .training.min_wer import MinWERLoss as MinWERLoss
from .training.transfer import TransferReport as TransferReport
from .training.transfer import transfer_encoder as transfer_encoder
