"""What modulated networks have learned, in numbers.

Clusterings and the test of the T-GSH score need scipy, ``pip install neuromod_ext[papers]``.
"""

from neuromod_ext.analysis.clustering import Clustering, cluster_tasks
from neuromod_ext.analysis.context import (
    MantelTest,
    context_similarity,
    mantel_test,
    neighbour_share,
)
from neuromod_ext.analysis.inverse import reconstruct
from neuromod_ext.analysis.tgsh import (
    PairSimilarity,
    Score,
    SimilarityHistogram,
    similarity_histogram,
)

__all__ = [
    "Clustering",
    "MantelTest",
    "PairSimilarity",
    "Score",
    "SimilarityHistogram",
    "cluster_tasks",
    "context_similarity",
    "mantel_test",
    "neighbour_share",
    "reconstruct",
    "similarity_histogram",
]
