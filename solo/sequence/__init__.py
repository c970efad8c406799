"""sequence: from bytes in a shard to the ids, patches and targets of a pack."""
