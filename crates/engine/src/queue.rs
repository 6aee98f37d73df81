//! How much may be in flight: counts that free themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is in flight now.
#[derive(Debug, Default)]
pub(crate) struct Occupancy {
    sequences: AtomicUsize,
    queued_tokens: AtomicUsize,
}

impl Occupancy {
    /// Sequences accepted and not yet gone, running ones included.
    pub(crate) fn sequences(&self) -> usize {
        self.sequences.load(Ordering::Acquire)
    }

    /// Prompt tokens accepted whose prefill has not begun.
    pub(crate) fn queued_tokens(&self) -> usize {
        self.queued_tokens.load(Ordering::Acquire)
    }

    /// Counts one more sequence. The caller has checked the caps and excludes other submitters meanwhile.
    pub(crate) fn enter(self: &Arc<Self>, tokens: usize) -> Ticket {
        self.sequences.fetch_add(1, Ordering::AcqRel);
        self.queued_tokens.fetch_add(tokens, Ordering::AcqRel);
        Ticket { occupancy: Arc::clone(self), tokens }
    }
}

/// One sequence's place; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Ticket {
    occupancy: Arc<Occupancy>,
    /// Tokens still counted as queued.
    tokens: usize,
}

impl Ticket {
    /// Prefill begins: its tokens no longer wait.
    pub(crate) fn leave_queue(&mut self) {
        self.occupancy.queued_tokens.fetch_sub(std::mem::take(&mut self.tokens), Ordering::AcqRel);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave_queue();
        self.occupancy.sequences.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_give_back_what_they_took() {
        let occupancy = Arc::new(Occupancy::default());
        let mut first = occupancy.enter(10);
        let second = occupancy.enter(5);
        assert_eq!((occupancy.sequences(), occupancy.queued_tokens()), (2, 15));
        first.leave_queue();
        assert_eq!((occupancy.sequences(), occupancy.queued_tokens()), (2, 5));
        drop(first);
        assert_eq!((occupancy.sequences(), occupancy.queued_tokens()), (1, 5));
        drop(second);
        assert_eq!((occupancy.sequences(), occupancy.queued_tokens()), (0, 0));
    }
}
