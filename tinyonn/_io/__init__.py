"""Files, streams, records, locks, options and units: what every layer above the ops shares."""
