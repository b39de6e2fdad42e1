// The public surface of @switchyard/core/experts: expert sets beyond the feed-forward ones of ../moe.
