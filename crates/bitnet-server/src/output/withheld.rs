//! What belongs to tokens (log-probabilities, ids) waits here until the text of the token has left: a log-probability
//! names its token, so it must not run ahead of stop strings and filters.

use std::collections::VecDeque;

/// Items in token order, each tied to the place in the text where its token ends.
#[derive(Debug)]
pub struct Withheld<T> {
    items: VecDeque<(Option<usize>, T)>,
    /// Text that was decoded and cleared of stop strings but has not left.
    unsent: String,
    /// Bytes of decoded text that have left unchanged.
    sent: usize,
    /// The filter changed the text: what follows no longer matches the tokens, and no item leaves any more.
    altered: bool,
}

impl<T> Withheld<T> {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { items: VecDeque::new(), unsent: String::new(), sent: 0, altered: false }
    }

    /// Adds the item of the newest token; `end` as in [`super::Piece`].
    pub fn push(&mut self, end: Option<usize>, item: T) {
        if end.is_some() {
            // Tokens whose bytes went into this character end with it.
            for (open_end, _) in self.items.iter_mut().rev().take_while(|(open_end, _)| open_end.is_none()) {
                *open_end = end;
            }
        }
        self.items.push_back((end, item));
    }

    /// `text` was cleared of stop strings and goes into the filter.
    pub fn cleared(&mut self, text: &str) {
        if !self.altered {
            self.unsent.push_str(text);
        }
    }

    /// `text` came out of the filter and leaves now; the items that may leave with it.
    pub fn release(&mut self, text: &str) -> Vec<T> {
        if !self.altered {
            let unchanged = common_prefix(&self.unsent, text);
            self.sent += unchanged;
            self.unsent.drain(..unchanged);
            self.altered = unchanged < text.len();
        }
        let sent = self.sent;
        let leaving = self.items.iter().take_while(|(end, _)| end.is_some_and(|end| end <= sent)).count();
        self.items.drain(..leaving).map(|(_, item)| item).collect()
    }

    /// The output ended by itself and all its text has left: the items of tokens whose character stayed incomplete.
    pub fn finish(&mut self, end: usize) -> Vec<T> {
        for (open_end, _) in self.items.iter_mut().filter(|(open_end, _)| open_end.is_none()) {
            *open_end = Some(end);
        }
        self.release("")
    }
}

impl<T> Default for Withheld<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes of the longest common prefix that ends on a character.
fn common_prefix(left: &str, right: &str) -> usize {
    left.chars().zip(right.chars()).take_while(|(left, right)| left == right).map(|(left, _)| left.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_leave_with_their_text() {
        let mut withheld = Withheld::new();
        withheld.push(Some(2), 'a');
        withheld.cleared("ab");
        withheld.push(Some(4), 'b');
        assert_eq!(withheld.release("ab"), ['a']);
        withheld.cleared("cd");
        assert!(withheld.release("c").is_empty());
        assert_eq!(withheld.release("d"), ['b']);
    }

    #[test]
    fn incomplete_characters_leave_together() {
        let mut withheld = Withheld::new();
        withheld.push(None, 1);
        withheld.push(None, 2);
        assert!(withheld.release("").is_empty());
        withheld.push(Some(3), 3);
        withheld.cleared("€");
        assert_eq!(withheld.release("€"), [1, 2, 3]);
        withheld.push(None, 4);
        withheld.cleared("\u{fffd}");
        assert!(withheld.release("\u{fffd}").is_empty());
        assert_eq!(withheld.finish(6), [4]);
    }

    #[test]
    fn nothing_leaves_after_a_change() {
        let mut withheld = Withheld::new();
        withheld.push(Some(2), 'a');
        withheld.push(Some(4), 'b');
        withheld.push(Some(6), 'c');
        withheld.cleared("abcdef");
        assert_eq!(withheld.release("ab**ef"), ['a']);
        withheld.push(Some(8), 'd');
        withheld.cleared("gh");
        assert!(withheld.release("gh").is_empty());
        assert!(withheld.finish(8).is_empty());
    }
}
