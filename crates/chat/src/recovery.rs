//! Names for what parsers forgive.

/// Declares the recoveries of a format: a constant each, and the list of all with their meanings.
macro_rules! recoveries {
    ($($constant:ident = $name:literal, $meaning:literal;)*) => {
        $(pub(super) const $constant: &str = $name;)*

        /// Every recovery that a parser can report, with its meaning. The names are fixed: they label metrics and log lines.
        pub const RECOVERIES: &[(&str, &str)] = &[$(($name, $meaning)),*];
    };
}

pub(crate) use recoveries;

/// Names in the order of first use, without repeats.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Vec<&'static str>);

impl Notes {
    pub(crate) fn add(&mut self, name: &'static str) {
        if !self.0.contains(&name) {
            self.0.push(name);
        }
    }

    pub(crate) fn append(&mut self, other: Self) {
        for name in other.0 {
            self.add(name);
        }
    }

    pub(crate) fn take(&mut self) -> Vec<&'static str> {
        std::mem::take(&mut self.0)
    }
}
