//! Scheduler, paged KV, sequences, the driver loop and the Runner seam.
