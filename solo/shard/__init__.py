"""shard: kept samples as WebDataset tars with a ledger."""
