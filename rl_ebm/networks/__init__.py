"""Networks that know nothing of rewards: the backbone, its pass over the prefix tree, tiles."""
