//! Text that may hold tool calls -> text and calls, as they come. The grammar has made the calls well-formed; an output that
//! was cut short may end inside one.

/// News of an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallPiece {
    /// Text outside calls.
    Text(String),
    /// A call of the function of this name begins.
    Start(String),
    /// More of the arguments of the call that began last.
    Arguments(String),
}

/// Reads one output.
#[derive(Clone, Debug)]
pub struct CallReader {
    start: &'static str,
    end: &'static str,
    place: Place,
    /// Text not told yet: it may belong to a tag or a header.
    held: String,
    num_calls: usize,
}

/// Where in the output the reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Text,
    /// Between the start tag and the arguments.
    Header,
    Arguments {
        depth: usize,
        in_string: bool,
        escaped: bool,
    },
    /// Between the arguments and the end tag.
    Tail,
}

const NAME: &str = "\"name\":";
const ARGUMENTS: &str = "\"arguments\":";

impl CallReader {
    /// At the start of an output whose calls stand between `start` and `end`.
    pub fn new(start: &'static str, end: &'static str) -> Self {
        Self { start, end, place: Place::Text, held: String::new(), num_calls: 0 }
    }

    /// Calls begun so far.
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Whether the output has begun a call that is not complete.
    pub fn is_inside_call(&self) -> bool {
        self.place != Place::Text
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Vec<CallPiece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// The output is over: what was held back and is text after all.
    pub fn finish(&mut self) -> Option<CallPiece> {
        let rest = std::mem::take(&mut self.held);
        (self.place == Place::Text && self.is_told(&rest)).then_some(CallPiece::Text(rest))
    }

    /// Reads on as far as one place goes; whether another step may bring more.
    fn step(&mut self, pieces: &mut Vec<CallPiece>) -> bool {
        match self.place {
            Place::Text => {
                let found = self.held.find(self.start);
                let text: String = self.held.drain(..found.unwrap_or_else(|| self.certain())).collect();
                if self.is_told(&text) {
                    pieces.push(CallPiece::Text(text));
                }
                if found.is_some() {
                    self.held.drain(..self.start.len());
                    self.place = Place::Header;
                }
                found.is_some()
            }
            Place::Header => match header(&self.held) {
                Some((name, len)) => {
                    pieces.push(CallPiece::Start(name));
                    self.held.drain(..len);
                    self.num_calls += 1;
                    self.place = Place::Arguments { depth: 0, in_string: false, escaped: false };
                    true
                }
                None => false,
            },
            Place::Arguments { .. } => {
                let len = self.arguments();
                let text: String = self.held.drain(..len).collect();
                if !text.is_empty() {
                    pieces.push(CallPiece::Arguments(text));
                }
                self.place == Place::Tail
            }
            Place::Tail => match self.held.find(self.end) {
                Some(at) => {
                    self.held.drain(..at + self.end.len());
                    self.place = Place::Text;
                    true
                }
                None => false,
            },
        }
    }

    /// Bytes of the held text that cannot be the beginning of a start tag.
    fn certain(&self) -> usize {
        let tag = (1..self.start.len()).rev().find(|&len| self.held.ends_with(&self.start[..len]));
        self.held.len() - tag.unwrap_or(0)
    }

    /// White space between calls is nobody's text.
    fn is_told(&self, text: &str) -> bool {
        !text.is_empty() && (self.num_calls == 0 || !text.trim().is_empty())
    }

    /// Bytes of the held text that belong to the arguments; the place is updated.
    fn arguments(&mut self) -> usize {
        let Place::Arguments { mut depth, mut in_string, mut escaped } = self.place else { return 0 };
        for (at, byte) in self.held.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => depth += 1,
                b'}' | b']' if !in_string => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        self.place = Place::Tail;
                        return at + 1;
                    }
                }
                _ => {}
            }
        }
        self.place = Place::Arguments { depth, in_string, escaped };
        self.held.len()
    }
}

/// The function's name and the length of all that stands before its arguments, once they have begun.
fn header(text: &str) -> Option<(String, usize)> {
    let name = text.find(NAME)? + NAME.len();
    let arguments = text.find(ARGUMENTS)?;
    let name = text.get(name..arguments)?.trim_matches([' ', ',', '"']).to_owned();
    let after = &text[arguments + ARGUMENTS.len()..];
    let begun = after.find(|c: char| !c.is_whitespace())?;
    Some((name, arguments + ARGUMENTS.len() + begun))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of `text` in portions of `size` bytes, neighbours of a kind joined.
    fn read(text: &str, size: usize) -> (Vec<CallPiece>, CallReader) {
        let mut reader = CallReader::new("<tool_call>", "</tool_call>");
        let portions: Vec<_> = text.as_bytes().chunks(size).map(|bytes| std::str::from_utf8(bytes).unwrap()).collect();
        let mut pieces: Vec<CallPiece> = Vec::new();
        let mut all: Vec<_> = portions.into_iter().flat_map(|portion| reader.push(portion)).collect();
        all.extend(reader.finish());
        for piece in all {
            match (pieces.last_mut(), piece) {
                (Some(CallPiece::Text(text)), CallPiece::Text(more))
                | (Some(CallPiece::Arguments(text)), CallPiece::Arguments(more)) => text.push_str(&more),
                (_, piece) => pieces.push(piece),
            }
        }
        (pieces, reader)
    }

    #[test]
    fn text_and_calls_are_told_apart_however_they_come() {
        let text = "a < <tool <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\":\"}\\\"</tool_call>\",\"y\":[{}]}}\n</tool_call>\n\
                    <tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>";
        let expected = [
            CallPiece::Text("a < <tool ".to_owned()),
            CallPiece::Start("f".to_owned()),
            CallPiece::Arguments("{\"x\":\"}\\\"</tool_call>\",\"y\":[{}]}".to_owned()),
            CallPiece::Start("g".to_owned()),
            CallPiece::Arguments("{}".to_owned()),
        ];
        for size in [1, 2, 7, text.len()] {
            let (pieces, reader) = read(text, size);
            assert_eq!(pieces, expected, "portions of {size}");
            assert!(reader.num_calls() == 2 && !reader.is_inside_call());
        }
    }

    #[test]
    fn what_only_looked_like_a_call_is_text() {
        let (pieces, reader) = read("1 <tool_cal", 3);
        assert_eq!(pieces, [CallPiece::Text("1 <tool_cal".to_owned())]);
        assert_eq!(reader.num_calls(), 0);
    }

    #[test]
    fn a_call_cut_short_is_no_text() {
        let (pieces, reader) = read("<tool_call>{\"name\":\"f\",\"argu", 4);
        assert!(pieces.is_empty() && reader.is_inside_call());
        let (pieces, reader) = read("<tool_call>{\"name\":\"f\",\"arguments\":{\"a", 4);
        assert_eq!(pieces, [CallPiece::Start("f".to_owned()), CallPiece::Arguments("{\"a".to_owned())]);
        assert!(reader.is_inside_call());
    }
}
