//! The suite that any backend must pass: each op against a reference backend over ragged shapes.
