//! Server-sent events from bytes, as the HTML standard reads them: lines end in LF, CR or both, `data` lines of an event
//! are joined, comments and other fields are skipped.

/// Takes bytes as they come, however they are cut.
#[derive(Debug, Default)]
pub(super) struct SseReader {
    line: Vec<u8>,
    data: Option<String>,
    /// The last byte was CR: a LF now belongs to it.
    after_cr: bool,
}

impl SseReader {
    /// The data of every event that these bytes complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &byte in bytes {
            let second_half = std::mem::replace(&mut self.after_cr, byte == b'\r') && byte == b'\n';
            match byte {
                b'\n' if second_half => {}
                b'\n' | b'\r' => events.extend(self.end_line()),
                _ => self.line.push(byte),
            }
        }
        events
    }

    fn end_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return self.data.take();
        }
        let text = String::from_utf8_lossy(&line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        if field == "data" {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": keep-alive\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:b\r\ndata:  c: é\r\nid: 7\r\n\r\ndata\r\rdata: [DONE]\n\n";

    fn expected() -> Vec<String> {
        ["{\"a\":1}", "b\n c: é", "", "[DONE]"].map(str::to_owned).to_vec()
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        assert_eq!(SseReader::default().push(STREAM.as_bytes()), expected());
        for size in 1..STREAM.len() {
            let mut reader = SseReader::default();
            let events: Vec<_> = STREAM.as_bytes().chunks(size).flat_map(|part| reader.push(part)).collect();
            assert_eq!(events, expected(), "cut every {size} bytes");
        }
    }

    #[test]
    fn an_event_that_is_not_ended_is_none() {
        assert_eq!(SseReader::default().push(b"data: 1\n"), Vec::<String>::new());
    }
}
