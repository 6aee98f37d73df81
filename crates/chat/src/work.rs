//! A count of the bytes looked at, for the test that work is linear; nothing outside tests.

#[cfg(test)]
thread_local! {
    static BYTES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Counts.
#[inline]
pub(crate) fn count(bytes: usize) {
    #[cfg(test)]
    BYTES.with(|all| all.set(all.get() + bytes));
    #[cfg(not(test))]
    let _ = bytes;
}

/// The count since the last call.
#[cfg(test)]
pub(crate) fn take() -> usize {
    BYTES.with(|all| all.replace(0))
}
