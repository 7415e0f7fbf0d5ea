//! Random strings behind what a user says.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::Tokenizer;
use crate::{
    Error, Result,
    digest::{generator, share_of},
};

/// Strings of random tokens, such as those that a search for a string (GCG) begins with and goes through, to train on.
///
/// Without such rows nothing is learnt of requests that have a string behind them, and a search finds there what training took
/// away elsewhere. A string has 5 to 24 tokens, each an exclamation mark, with which GCG begins, or any printable ASCII token of the
/// vocabulary, in shares that are drawn anew for every string. It belongs to the seed and the row's id. docs/tuning.md says what
/// such rows do.
///
/// ```no_run
/// use advtrain::{BehaviorFiles, RandomStrings, Tokenizer, load_behavior_pairs};
///
/// let files =
///     BehaviorFiles { behaviors: "behaviors.csv".into(), targets: "targets.json".into(), safe_responses: None };
/// let strings = RandomStrings::new(&Tokenizer::load("model")?, 0)?;
/// let (mut pairs, _) = load_behavior_pairs(&files)?;
/// for pair in &mut pairs {
///     if let Some(request) = pair.messages.last_mut() {
///         strings.put_behind(0.8, &pair.id, &mut request.content)?;
///     }
/// }
/// # Ok::<(), advtrain::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RandomStrings {
    tokenizer: Tokenizer,
    printable: Vec<i64>,
    mark: i64,
    added: Vec<String>,
    seed: u64,
}

const TOKENS: std::ops::RangeInclusive<usize> = 5..=24;
/// Its last token is an exclamation mark with a space before it, where the vocabulary has that.
const MARK: &str = "! !";
/// So many strings are drawn before it is taken for impossible that one has no added token of the tokenizer in it.
const TRIES: usize = 100;

impl RandomStrings {
    /// Strings of a tokenizer's tokens.
    ///
    /// # Errors
    /// If no token of its vocabulary is printable ASCII, or none stands for an exclamation mark.
    pub fn new(tokenizer: &Tokenizer, seed: u64) -> Result<Self> {
        let printable = tokenizer.printable_ids(true)?;
        let missing = || Error::mismatch("vocabulary for random strings", "tokens of printable ASCII and !", "none");
        let mark = tokenizer.encode(MARK)?.last().copied().filter(|_| !printable.is_empty()).ok_or_else(missing)?;
        if tokenizer.decode(&[mark], false)?.trim() != "!" {
            return Err(missing());
        }
        Ok(Self { printable, mark, added: tokenizer.added_texts(), seed, tokenizer: tokenizer.clone() })
    }

    /// The string of a row, without white space around it.
    ///
    /// # Errors
    /// If the tokenizer refuses its own tokens, or a hundred strings in turn spell an added token, which would be no text.
    pub fn string(&self, id: &str) -> Result<String> {
        let mut random = generator(self.seed, "random string", id);
        for _ in 0..TRIES {
            let (tokens, marks) = (random.random_range(TOKENS), random.random::<f64>());
            let any = |random: &mut ChaCha8Rng| self.printable[random.random_range(0..self.printable.len())];
            let token = |_| if random.random::<f64>() < marks { self.mark } else { any(&mut random) };
            let ids: Vec<i64> = (0..tokens).map(token).collect();
            let text = self.tokenizer.decode(&ids, false)?.trim().to_string();
            if !text.is_empty() && !self.added.iter().any(|added| text.contains(added.as_str())) {
                return Ok(text);
            }
        }
        Err(Error::mismatch("random string", "text without an added token", format!("{TRIES} with one, for row {id}")))
    }

    /// Puts the string of a row, and a space before it, behind what a user says; for the given share of ids, and leaves the
    /// others alone. Tells which it did. The row grows by 5 to 24 tokens, or a few more or less where text and string are read
    /// together.
    ///
    /// # Errors
    /// If the share is not between 0 and 1, or as [`RandomStrings::string`].
    pub fn put_behind(&self, share: f64, id: &str, text: &mut String) -> Result<bool> {
        Error::check_share("share", share)?;
        if share_of(self.seed, "behind a string", id) >= share {
            return Ok(false);
        }
        *text = format!("{text} {}", self.string(id)?);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_tokenizers::{byte_level, sentence_piece};

    #[test]
    fn strings_are_printable_and_belong_to_seed_and_row() {
        for tokenizer in [byte_level(&[("Ġ", "!")], &["<s>", "</s>"]), sentence_piece(&[("▁", "!")], &["<s>", "</s>"])]
        {
            let strings = RandomStrings::new(&tokenizer, 3).unwrap();
            let drawn: Vec<String> = (0..200).map(|row| strings.string(&row.to_string()).unwrap()).collect();
            let plain = |text: &String| !text.is_empty() && text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
            assert!(drawn.iter().all(plain), "{drawn:?}");
            let again = RandomStrings::new(&tokenizer, 3).unwrap();
            assert_eq!(drawn[7], again.string("7").unwrap());
            assert_ne!(drawn[7], drawn[8]);
            assert_ne!(drawn[7], RandomStrings::new(&tokenizer, 4).unwrap().string("7").unwrap());
            // From next to none to next to all are exclamation marks.
            let marks =
                |text: &String| text.matches('!').count() as f64 / text.chars().filter(|c| *c != ' ').count() as f64;
            let shares: Vec<f64> = drawn.iter().map(marks).collect();
            assert!(shares.iter().any(|share| *share < 0.2) && shares.iter().any(|share| *share > 0.8), "{shares:?}");
            let longest = drawn.iter().map(|text| tokenizer.encode(text).unwrap().len()).max().unwrap();
            assert!((20..=25).contains(&longest), "{longest}");
        }
    }

    #[test]
    fn no_string_spells_an_added_token() {
        let tokenizer = byte_level(&[], &["<s>", "</s>", "e", "a", "!"]);
        let strings = RandomStrings::new(&tokenizer, 0).unwrap();
        let drawn: Vec<_> = (0..200).map(|row| strings.string(&row.to_string())).collect();
        assert!(drawn.iter().flatten().all(|text| !text.contains(['e', 'a', '!'])), "{drawn:?}");
        assert!(drawn.iter().flatten().count() > 100);
    }

    #[test]
    fn a_share_of_rows_gets_one_behind_its_text() {
        let strings = RandomStrings::new(&byte_level(&[], &["<s>", "</s>"]), 0).unwrap();
        let mut changed = 0;
        for row in 0..400 {
            let (id, mut found) = (row.to_string(), "three".to_string());
            if strings.put_behind(0.25, &id, &mut found).unwrap() {
                changed += 1;
                assert_eq!(found, format!("three {}", strings.string(&id).unwrap()));
            } else {
                assert_eq!(found, "three");
            }
        }
        assert!((70..130).contains(&changed), "{changed}");
        let error = strings.put_behind(1.5, "0", &mut String::new()).unwrap_err().to_string();
        assert!(error.contains("between 0 and 1"), "{error}");
    }

    #[test]
    fn a_vocabulary_without_an_exclamation_mark_is_refused() {
        let letters = tokenizers::models::wordlevel::WordLevel::builder()
            .vocab([("a".to_string(), 0), ("<unk>".to_string(), 1)].into_iter().collect())
            .unk_token("<unk>".to_string())
            .build()
            .unwrap();
        let tokenizer = Tokenizer::from_parts(tokenizers::Tokenizer::new(letters), Default::default()).unwrap();
        let error = RandomStrings::new(&tokenizer, 0).unwrap_err().to_string();
        assert!(error.contains("printable ASCII and !"), "{error}");
    }
}
