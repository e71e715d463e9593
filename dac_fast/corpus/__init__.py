"""A corpus to codes, and the codes back: `tokenize` (`dac-fast tokenize`) and `read`.

sources    what there is to tokenize       folder     the dataset's folder
plan       which goes into which shard     local      shards made in this process
encoding   a recording to a record         on_ray     shards made by Ray Data
shards     the formats                     verify     encoded again, and compared
"""

from dac_fast.corpus.folder import DatasetError
from dac_fast.corpus.reading import CodesDataset, read
from dac_fast.corpus.shards import Record

__all__ = ["CodesDataset", "DatasetError", "Record", "read"]
