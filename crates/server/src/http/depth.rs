//! Nesting of JSON, counted while it arrives: nothing that descends recursively sees a body that is too deep.

/// How deep a text is nested so far. Brackets in strings do not count; whether the text is JSON at all is not asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gauge {
    depth: usize,
    deepest: usize,
    in_string: bool,
    escaped: bool,
}

impl Gauge {
    /// Takes the next piece of the text; returns the deepest nesting up to its end.
    pub(crate) fn read(&mut self, piece: &[u8]) -> usize {
        for &byte in piece {
            if self.in_string {
                let ends = byte == b'"' && !self.escaped;
                self.escaped = byte == b'\\' && !self.escaped;
                self.in_string = !ends;
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'[' | b'{' => {
                    self.depth += 1;
                    self.deepest = self.deepest.max(self.depth);
                }
                b']' | b'}' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        self.deepest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_outside_strings_however_the_text_is_cut() {
        let cases = [
            ("{}", 1),
            (r#"{"a":[{"b":1}],"c":[]}"#, 3),
            (r#"{"a":"[[[\"[[\\"}"#, 1),
            (r#"["\\",["\\\"",[1]]]"#, 3),
            ("]]]]]][[", 2),
            ("7", 0),
        ];
        for (text, depth) in cases {
            assert_eq!(Gauge::default().read(text.as_bytes()), depth, "{text}");
            let mut gauge = Gauge::default();
            let deepest = text.bytes().map(|byte| gauge.read(&[byte])).max();
            assert_eq!(deepest, Some(depth), "{text}");
        }
    }
}
