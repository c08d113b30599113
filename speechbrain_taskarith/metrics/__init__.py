"""What is measured and how it is shown: WER, lifelong matrices, tables, plots.

Authors
 * speechbrain_taskarith contributors 2026
"""

from speechbrain_taskarith.metrics.cl_masr import write_cl_masr_log
from speechbrain_taskarith.metrics.lifelong import LifelongMatrix
from speechbrain_taskarith.metrics.plots import (
    plot_by_layer,
    plot_heat_map,
    plot_scale_curve,
    plot_wer_matrix,
)
from speechbrain_taskarith.metrics.rare_words import (
    RareWordReport,
    RareWords,
    WordGroupErrors,
    rare_words_by_language,
)
from speechbrain_taskarith.metrics.significance import (
    PairedBootstrap,
    confidence_interval,
    paired_bootstrap,
)
from speechbrain_taskarith.metrics.summary import (
    Summary,
    merge_seeds,
    merge_summaries,
)
from speechbrain_taskarith.metrics.translation import (
    TranslationReport,
    translation_scores,
)
from speechbrain_taskarith.metrics.word_errors import (
    UtteranceErrors,
    WERReport,
    by_domain,
    wer,
)

__all__ = [
    "LifelongMatrix",
    "PairedBootstrap",
    "RareWordReport",
    "RareWords",
    "Summary",
    "TranslationReport",
    "UtteranceErrors",
    "WERReport",
    "WordGroupErrors",
    "by_domain",
    "confidence_interval",
    "merge_seeds",
    "merge_summaries",
    "paired_bootstrap",
    "plot_by_layer",
    "plot_heat_map",
    "plot_scale_curve",
    "plot_wer_matrix",
    "rare_words_by_language",
    "translation_scores",
    "wer",
    "write_cl_masr_log",
]
