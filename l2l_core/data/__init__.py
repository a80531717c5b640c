"""Tables -> pairs and targets -> batches."""
