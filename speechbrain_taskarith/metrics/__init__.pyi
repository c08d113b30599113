from .lifelong import (
    LifelongMatrix as LifelongMatrix,
)
from .lifelong_files import (
    write_cl_masr_log as write_cl_masr_log,
)
from .plots.bars import (
    plot_before_after as plot_before_after,
)
from .plots.bars import (
    plot_by_layer as plot_by_layer,
)
from .plots.bars import (
    plot_by_row as plot_by_row,
)
from .plots.cells import (
    plot_heat_map as plot_heat_map,
)
from .plots.cells import (
    plot_scale_surface as plot_scale_surface,
)
from .plots.cells import (
    plot_wer_matrix as plot_wer_matrix,
)
from .plots.curves import (
    plot_scale_curve as plot_scale_curve,
)
from .rare_words import (
    RareWordReport as RareWordReport,
)
from .rare_words import (
    RareWords as RareWords,
)
from .rare_words import (
    WordGroupErrors as WordGroupErrors,
)
from .rare_words import (
    rare_words_by_language as rare_words_by_language,
)
from .significance import (
    PairedBootstrap as PairedBootstrap,
)
from .significance import (
    confidence_interval as confidence_interval,
)
from .significance import (
    paired_bootstrap as paired_bootstrap,
)
from .summary import (
    Summary as Summary,
)
from .summary import (
    merge_seeds as merge_seeds,
)
from .summary import (
    merge_summaries as merge_summaries,
)
from .translation_quality.bootstrap import (
    compare_translations as compare_translations,
)
from .translation_quality.bootstrap import (
    translation_intervals as translation_intervals,
)
from .translation_quality.comet import (
    comet_score as comet_score,
)
from .translation_quality.scores import (
    TranslationReport as TranslationReport,
)
from .translation_quality.scores import (
    bleu_tokenizer as bleu_tokenizer,
)
from .translation_quality.scores import (
    translation_scores as translation_scores,
)
from .word_errors import (
    UtteranceErrors as UtteranceErrors,
)
from .word_errors import (
    WERReport as WERReport,
)
from .word_errors import (
    by_domain as by_domain,
)
from .word_errors import (
    wer as wer,
)
