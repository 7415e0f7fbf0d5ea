//! Characters of a private-use plane that mark places in a rendered text.

use std::collections::HashSet;

/// Private-use characters that none of the texts holds, so that each is free to mark a place.
pub(super) fn unused_characters<'a>(texts: impl IntoIterator<Item = &'a str>) -> impl Iterator<Item = char> {
    let plane = '\u{F0000}'..='\u{FFFFD}';
    let used: HashSet<char> =
        texts.into_iter().flat_map(str::chars).filter(|character| plane.contains(character)).collect();
    plane.filter(move |character| !used.contains(character))
}

/// The text without its marks, and each mark with the byte position in that text at which it stood, in order.
pub(super) fn strip(text: &str, marks: &HashSet<char>) -> (String, Vec<(char, usize)>) {
    let mut plain = String::with_capacity(text.len());
    let mut places = Vec::new();
    for character in text.chars() {
        if marks.contains(&character) {
            places.push((character, plain.len()));
        } else {
            plain.push(character);
        }
    }
    (plain, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_unused_and_found_again() {
        let mut free = unused_characters(["a\u{F0000}", "\u{F0002}"]);
        let (open, close) = (free.next().unwrap(), free.next().unwrap());
        assert_eq!((open, close), ('\u{F0001}', '\u{F0003}'));
        let (plain, places) = strip(&format!("ä{open}b{close}\u{F0000}"), &HashSet::from([open, close]));
        assert_eq!(plain, "äb\u{F0000}");
        assert_eq!(places, [(open, 2), (close, 3)]);
    }
}
