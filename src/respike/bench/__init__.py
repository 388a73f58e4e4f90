"""Speed and memory against length, beside originals and peers; and predictions before a run."""
