//! Reading answers, token by token.
