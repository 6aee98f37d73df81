# Serve the demo model.
serve *ARGS:
    cargo run --release -- {{ARGS}}

# Every test.
test *SUITES:
    tests/run {{SUITES}}

# Formatting and lints only.
lint:
    tests/run lint

# Rust tests of one crate: `just crate chat`.
crate NAME:
    cargo test -p ctxserve-{{NAME}}

# End-to-end tests only.
e2e:
    tests/run e2e

fmt:
    cargo fmt --all

doc:
    cargo doc --workspace --no-deps --open
