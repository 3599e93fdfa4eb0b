//! Stop strings, searched in the text as it will be sent. Text that could be the start of one is held back.

use std::sync::Arc;

/// The stop strings of a request, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStrings(Arc<[String]>);

/// Why a list of stop strings is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// Too many.
    #[error("at most {MAX_STRINGS} stop strings are allowed, not {0}")]
    TooMany(usize),
    /// One that is too long, in bytes.
    #[error("a stop string may have at most {MAX_BYTES} bytes, not {0}")]
    TooLong(usize),
    /// One that is empty: it would end everything at once.
    #[error("a stop string may not be empty")]
    Empty,
}

/// Most stop strings a request may have.
const MAX_STRINGS: usize = 4;
/// Most bytes of one.
const MAX_BYTES: usize = 256;

impl StopStrings {
    /// Checks `strings`.
    ///
    /// # Errors
    /// [`StopError`].
    pub fn new(strings: Vec<String>) -> Result<Self, StopError> {
        if strings.len() > MAX_STRINGS {
            return Err(StopError::TooMany(strings.len()));
        }
        for string in &strings {
            match string.len() {
                0 => return Err(StopError::Empty),
                len if len > MAX_BYTES => return Err(StopError::TooLong(len)),
                _ => {}
            }
        }
        Ok(Self(strings.into()))
    }

    /// The strings.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// Looks for stop strings in a text that arrives in pieces. The result does not depend on where the pieces end: the text
/// ends before the stop string that is complete first (of two that complete together, the one that starts first).
#[derive(Debug)]
pub struct StopMatcher {
    strings: StopStrings,
    /// The end of the text so far that could still become a stop string; always starts and ends on a character.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// At the start of a text.
    pub fn new(strings: StopStrings) -> Self {
        Self { strings, held: String::new(), stopped: false }
    }

    /// Whether a stop string was found. Text that comes after is dropped.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds `text` and returns what may leave.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped || text.is_empty() {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let kept = self.held.split_off(self.held.len() - self.live_suffix());
        std::mem::replace(&mut self.held, kept)
    }

    /// The text is over: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start of the match that ends first.
    fn first_match(&self) -> Option<usize> {
        let matches =
            self.strings.0.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        matches.min().map(|(_, start)| start)
    }

    /// Length of the longest suffix that is the beginning of a stop string.
    fn live_suffix(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = held.len().min(stop.len() - 1);
            (1..=most).rev().find(|&len| held.ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
        };
        self.strings.0.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(strings: &[&str]) -> StopStrings {
        StopStrings::new(strings.iter().map(ToString::to_string).collect()).unwrap()
    }

    #[test]
    fn limits() {
        assert_eq!(StopStrings::new(vec![String::new()]), Err(StopError::Empty));
        assert_eq!(StopStrings::new(vec!["x".repeat(257)]), Err(StopError::TooLong(257)));
        assert_eq!(StopStrings::new(vec!["x".into(); 5]), Err(StopError::TooMany(5)));
        assert!(StopStrings::new(vec!["x".repeat(256); 4]).is_ok());
    }

    #[test]
    fn holds_back_and_releases() {
        let mut matcher = StopMatcher::new(stops(&["END", "\n\n"]));
        assert_eq!(matcher.push("a E"), "a ");
        assert_eq!(matcher.push("N"), "");
        assert_eq!(matcher.push("E"), "EN");
        assert_eq!(matcher.push("ND tail"), "");
        assert!(matcher.stopped());
        assert_eq!(matcher.push("more") + &matcher.finish(), "");
    }

    #[test]
    fn the_first_to_complete_wins() {
        let mut matcher = StopMatcher::new(stops(&["abcd", "bc"]));
        assert_eq!(matcher.push("xabcd"), "xa");
        assert!(matcher.stopped());
    }

    /// The specification: feed single characters, look for a stop string at the end.
    fn whole(text: &str, strings: &StopStrings) -> String {
        let mut seen = String::new();
        for character in text.chars() {
            seen.push(character);
            let longest = strings.as_slice().iter().filter(|stop| seen.ends_with(stop.as_str())).map(String::len).max();
            if let Some(len) = longest {
                seen.truncate(seen.len() - len);
                return seen;
            }
        }
        seen
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_text(
            text in "[abé]{0,40}",
            strings in prop::collection::vec("[abé]{1,5}", 0..4),
            cuts in prop::collection::vec(1_usize..6, 0..40),
        ) {
            let strings = StopStrings::new(strings).unwrap();
            let mut matcher = StopMatcher::new(strings.clone());
            let (mut sent, mut rest, mut cuts) = (String::new(), text.as_str(), cuts.into_iter());
            while !rest.is_empty() {
                let count = cuts.next().unwrap_or(1);
                let end = rest.char_indices().nth(count).map_or(rest.len(), |(index, _)| index);
                sent += &matcher.push(&rest[..end]);
                rest = &rest[end..];
                // Nothing that leaves is ever taken back.
                prop_assert!(whole(&text, &strings).starts_with(&sent));
            }
            sent += &matcher.finish();
            prop_assert_eq!(sent, whole(&text, &strings));
        }
    }
}
