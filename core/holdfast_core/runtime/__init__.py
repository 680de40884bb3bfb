"""The shell around the model: channels, status table, configuration, clock, logs, metrics, metadata store."""
