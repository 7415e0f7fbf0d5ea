//! Texts cut at sentences and words.

use rand::{Rng, RngExt, seq::index::sample};

/// Two children of two texts, which change places at up to `points` borders between sentences; shorter texts have
/// fewer.
pub(super) fn crossover(left: &str, right: &str, points: usize, random: &mut impl Rng) -> [String; 2] {
    let (left, right) = (sentences(left), sentences(right));
    let borders = left.len().min(right.len()).saturating_sub(1);
    let mut cuts = sample(random, borders, points.min(borders)).into_vec();
    cuts.sort_unstable();
    let mut children = [String::new(), String::new()];
    let mut from = 0;
    for (at, cut) in cuts.iter().map(|cut| cut + 1).chain([usize::MAX]).enumerate() {
        for (child, parent) in [&left, &right].into_iter().enumerate() {
            let piece = parent.get(from..cut.min(parent.len())).unwrap_or_default().concat();
            children[(child + at) % 2].push_str(&piece);
        }
        from = cut;
    }
    children.map(|child| child.trim().to_string())
}

/// The sentences of a text with what is between them, so that their concatenation is the text.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut from = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let ends = matches!(character, '.' | '!' | '?' | '\n');
        let next = characters.peek().copied();
        if ends && next.is_some_and(|(_, next)| next.is_whitespace()) {
            while characters.next_if(|(_, next)| next.is_whitespace()).is_some() {}
            let to = characters.peek().map_or(text.len(), |(to, _)| *to);
            pieces.push(&text[from..to]);
            from = to;
        } else if ends && character == '\n' {
            pieces.push(&text[from..at + 1]);
            from = at + 1;
        }
    }
    if from < text.len() {
        pieces.push(&text[from..]);
    }
    pieces
}

/// The words of a text and what is between them, by turns, beginning with what is before the first word, which may be
/// empty.
pub(super) fn words(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let (mut from, mut in_word) = (0, false);
    for (at, character) in text.char_indices() {
        let of_word = character.is_alphanumeric() || (in_word && matches!(character, '\'' | '-'));
        if of_word != in_word {
            pieces.push(&text[from..at]);
            (from, in_word) = (at, of_word);
        }
    }
    pieces.push(&text[from..]);
    pieces
}

/// The text with each word replaced where `replace` gives another; capitals at the beginning stay.
pub(super) fn with_words(text: &str, mut replace: impl FnMut(&str) -> Option<String>) -> String {
    let pieces = words(text).into_iter().enumerate().map(|(at, piece)| {
        let other = if at % 2 == 1 { replace(&piece.to_lowercase()) } else { None };
        match other {
            Some(other) if piece.starts_with(char::is_uppercase) => capitalised(&other),
            Some(other) => other,
            None => piece.to_string(),
        }
    });
    pieces.collect()
}

fn capitalised(word: &str) -> String {
    let mut characters = word.chars();
    characters.next().map_or(String::new(), |first| first.to_uppercase().chain(characters).collect())
}

/// A number drawn with these weights, which are at least 0 and not all 0.
pub(super) fn roulette(weights: &[f64], random: &mut impl Rng) -> usize {
    let mut left = random.random::<f64>() * weights.iter().sum::<f64>();
    for (at, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return at;
        }
    }
    weights.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn sentences_and_words_make_up_the_text() {
        let text = "One. Two is 2.5!  Three?\nFour's it";
        assert_eq!(sentences(text), ["One. ", "Two is 2.5!  ", "Three?\n", "Four's it"]);
        assert_eq!(words(text).concat(), text);
        assert_eq!(words("a, b's"), ["", "a", ", ", "b's"]);
        assert_eq!(sentences("").len(), 0);
    }

    /// Sentence i of a child is sentence i of one parent, and of the other child of the other one.
    #[test]
    fn children_share_out_the_sentences() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let (left, right) = ("a0. a1. a2. a3.", "b0. b1. b2.");
        let mut crossed = 0;
        for _ in 0..50 {
            let [first, second] = crossover(left, right, 5, &mut random);
            let (first, second) = (sentences(&first), sentences(&second));
            for at in 0..3 {
                let mut pair = [first[at].trim(), second[at].trim()];
                pair.sort_unstable();
                assert_eq!(pair, [format!("a{at}."), format!("b{at}.")]);
            }
            crossed += usize::from(first[1].starts_with('b') != first[0].starts_with('b'));
        }
        assert_eq!(crossed, 50, "two borders, and five were asked for: each is cut");
    }

    #[test]
    fn a_text_of_one_sentence_has_no_border() {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(crossover("a.", "b. c.", 5, &mut random), ["a.", "b. c."]);
    }

    #[test]
    fn words_keep_their_capitals() {
        let swap = |word: &str| (word == "begin").then(|| "start".to_string());
        assert_eq!(with_words("Begin to begin, beginner.", swap), "Start to start, beginner.");
    }
}
