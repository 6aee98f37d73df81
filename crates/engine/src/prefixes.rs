//! Prefixes at work: whether a newcomer waits for one, and what its prompt's tokens were found to be.

use crate::pages::Lost;
use crate::sequence::Sequence;

/// Why prompt tokens had to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissCause {
    /// Nobody has asked this before, or it is long ago.
    New,
    /// They were kept once, and their pages were needed.
    Evicted,
    /// They were kept before the cache was reset.
    Reset,
    /// Full attention has them, and windowed layers have not kept what is seen from there.
    Window,
    /// Others begin like this, under another salt.
    Salt,
    /// Those after the last whole page, and the prompt's last token, from which the answer goes on.
    Tail,
    /// Nothing is shared.
    Disabled,
}

impl MissCause {
    /// All causes.
    pub const ALL: [Self; 7] =
        [Self::New, Self::Evicted, Self::Reset, Self::Window, Self::Salt, Self::Tail, Self::Disabled];

    /// As a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Evicted => "evicted",
            Self::Reset => "reset",
            Self::Window => "window",
            Self::Salt => "salt",
            Self::Tail => "tail",
            Self::Disabled => "disabled",
        }
    }
}

/// Prompt tokens since start, by what the prefix cache knew of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCounts {
    /// Tokens that were looked up.
    pub queries: u64,
    /// Those of them that were found.
    pub hits: u64,
    /// Prompt tokens that had to be computed, by cause in the order of [`MissCause::ALL`].
    pub misses: [u64; MissCause::ALL.len()],
}

impl PrefixCounts {
    fn miss(&mut self, cause: MissCause, tokens: usize) {
        self.misses[cause as usize] += tokens as u64;
    }

    /// Prompt tokens that had to be computed for this cause.
    pub fn missed(&self, cause: MissCause) -> u64 {
        self.misses[cause as usize]
    }

    /// Counts a sequence that begins now with what it found.
    pub(crate) fn count(&mut self, sequence: &Sequence, caching: bool) {
        let (prompt, found) = (sequence.history().prompt.len(), sequence.computed());
        if !caching {
            return self.miss(MissCause::Disabled, prompt);
        }
        self.queries += prompt as u64;
        self.hits += found as u64;
        let (size, most) = (sequence.kv().page_size(), sequence.most_shared());
        let known = sequence.kv().known();
        self.miss(MissCause::Window, known.deepest * size - found);
        self.miss(MissCause::Tail, prompt - most * size);
        let unknown = most - known.deepest;
        let history = sequence.history();
        let lost = sequence.kv().lost(sequence.salt(), &history, most);
        let rest = match lost {
            Some((Lost::Evicted, pages)) => {
                self.miss(MissCause::Evicted, pages * size);
                unknown - pages
            }
            Some((Lost::Reset, pages)) => {
                self.miss(MissCause::Reset, pages * size);
                unknown - pages
            }
            None => unknown,
        };
        let salted = known.deepest == 0 && rest == unknown && rest > 0 && sequence.kv().is_opening(&history);
        self.miss(if salted { MissCause::Salt } else { MissCause::New }, rest * size);
    }
}
