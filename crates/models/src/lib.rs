//! Model families: configuration, weight names, forward pass.
