//! `strftime` of a date, for templates that ask what day it is.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
/// Days before each month of a common year.
const BEFORE: [u32; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];

/// A day. Its time is midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    year: u32,
    /// From 1.
    month: usize,
    /// From 1.
    day: u32,
}

impl Date {
    /// Reads `YYYY-MM-DD`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-');
        let mut part = |most: u32| parts.next()?.parse::<u32>().ok().filter(|n| (1..=most).contains(n));
        let (year, month, day) = (part(9999)?, part(12)?, part(31)?);
        Some(Self { year, month: usize::try_from(month).ok()?, day })
    }

    fn day_of_year(self) -> u32 {
        let is_leap =
            self.year.is_multiple_of(4) && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        BEFORE[self.month - 1] + self.day + u32::from(is_leap && self.month > 2)
    }

    /// From Monday, 0.
    fn weekday(self) -> usize {
        let y = self.year - 1;
        let days = y * 365 + y / 4 - y / 100 + y / 400 + self.day_of_year() - 1;
        days as usize % 7
    }

    /// As Python's `strftime` in the C locale. Directives that it does not know stand for themselves.
    pub(super) fn format(self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let Some(directive) = chars.next() else {
                out.push('%');
                break;
            };
            let (month, weekday) = (MONTHS[self.month - 1], DAYS[self.weekday()]);
            match directive {
                'Y' => out.push_str(&self.year.to_string()),
                'y' => out.push_str(&format!("{:02}", self.year % 100)),
                'm' => out.push_str(&format!("{:02}", self.month)),
                'd' => out.push_str(&format!("{:02}", self.day)),
                'e' => out.push_str(&format!("{:2}", self.day)),
                'j' => out.push_str(&format!("{:03}", self.day_of_year())),
                'B' => out.push_str(month),
                'b' | 'h' => out.push_str(&month[..3]),
                'A' => out.push_str(weekday),
                'a' => out.push_str(&weekday[..3]),
                'F' => out.push_str(&self.format("%Y-%m-%d")),
                'D' | 'x' => out.push_str(&self.format("%m/%d/%y")),
                'H' | 'M' | 'S' => out.push_str("00"),
                'I' => out.push_str("12"),
                'p' => out.push_str("AM"),
                'T' | 'X' => out.push_str("00:00:00"),
                'R' => out.push_str("00:00"),
                '%' => out.push('%'),
                other => out.extend(['%', other]),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_writes_it() {
        let format = |date: &str, format: &str| Date::parse(date).unwrap().format(format);
        assert_eq!(format("2026-05-12", "%d %b %Y"), "12 May 2026");
        assert_eq!(format("2024-12-31", "%A, %B %d, %y (%j) %%"), "Tuesday, December 31, 24 (366) %");
        assert_eq!(format("2000-02-29", "%a %e %F %H:%M %q%"), "Tue 29 2000-02-29 00:00 %q%");
        assert_eq!(format("1970-01-01", "%a %-"), "Thu %-");
    }

    #[test]
    fn other_text_is_no_date() {
        for text in ["", "2026", "2026-13-01", "2026-00-01", "2026-01-32", "0-1-1", "x-y-z", "2026-01-01-01"]
        {
            assert_eq!(Date::parse(text), None, "{text}");
        }
    }
}
