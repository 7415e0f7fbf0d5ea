//! Synonyms, and how well words have done so far.

use std::collections::{BTreeMap, HashMap};

use rand::{Rng, RngExt, seq::index::sample};

use super::text::{roulette, with_words, words};
use crate::digest::bytes_digest;

/// Words that may stand for each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synonyms(BTreeMap<String, Vec<String>>);

impl Synonyms {
    /// One group of words per line, between spaces; each may stand for every other, and a hyphen in a word for a space.
    pub fn parse(text: &str) -> Self {
        let mut synonyms: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in text.lines() {
            let group: Vec<String> =
                line.split_whitespace().map(|word| word.replace('-', " ").to_lowercase()).collect();
            for word in &group {
                let known = synonyms.entry(word.clone()).or_default();
                let others = group.iter().filter(|other| *other != word);
                let new: Vec<String> = others.filter(|other| !known.contains(other)).cloned().collect();
                known.extend(new);
            }
        }
        Self(synonyms)
    }

    /// The small list that is shipped.
    pub fn shipped() -> Self {
        Self::parse(include_str!("synonyms.txt"))
    }

    /// A text that differs between lists.
    pub(super) fn digest(&self) -> String {
        bytes_digest(format!("{:?}", self.0).as_bytes())
    }

    fn of(&self, word: &str) -> &[String] {
        self.0.get(word).map_or(&[], Vec::as_slice)
    }

    /// The text with each word that has synonyms replaced by one of them with a probability.
    pub(super) fn mutate(&self, text: &str, probability: f64, random: &mut impl Rng) -> String {
        with_words(text, |word| {
            let others = self.of(word);
            if others.is_empty() || random.random::<f64>() >= probability {
                return None;
            }
            Some(others[random.random_range(0..others.len())].clone())
        })
    }
}

/// How fit the texts were on average that a word occurred in, with half of what it was before.
#[derive(Clone, Debug, Default)]
pub(super) struct WordScores(HashMap<String, f64>);

impl WordScores {
    /// Learns from texts and their fitness.
    pub(super) fn learn<'t>(&mut self, texts: impl IntoIterator<Item = (&'t str, f64)>) {
        let mut sums: HashMap<String, (f64, f64)> = HashMap::new();
        for (text, fitness) in texts {
            let mut seen: Vec<String> = words(text).into_iter().skip(1).step_by(2).map(str::to_lowercase).collect();
            seen.sort_unstable();
            seen.dedup();
            for word in seen {
                let (sum, count) = sums.entry(word).or_default();
                (*sum, *count) = (*sum + fitness, *count + 1.0);
            }
        }
        for (word, (sum, count)) in sums {
            let mean = sum / count;
            self.0.entry(word).and_modify(|score| *score = (*score + mean) / 2.0).or_insert(mean);
        }
    }

    /// The text with up to `most` of its words that have synonyms replaced, each with a probability, by itself or one
    /// of them, the likelier the better they have done.
    pub(super) fn improve(
        &self,
        text: &str,
        synonyms: &Synonyms,
        (most, probability): (usize, f64),
        random: &mut impl Rng,
    ) -> String {
        let replaceable = |word: &str| !synonyms.of(&word.to_lowercase()).is_empty();
        let count = words(text).into_iter().skip(1).step_by(2).filter(|word| replaceable(word)).count();
        let chosen = sample(random, count, most.min(count)).into_vec();
        let mut place = 0;
        with_words(text, |word| {
            if !replaceable(word) {
                return None;
            }
            place += 1;
            if !chosen.contains(&(place - 1)) || random.random::<f64>() >= probability {
                return None;
            }
            self.better(word, synonyms.of(word), random)
        })
    }

    /// One of the words that may stand for this one, or none where it is to stay.
    fn better(&self, word: &str, others: &[String], random: &mut impl Rng) -> Option<String> {
        let known: Vec<&String> = others.iter().filter(|other| self.0.contains_key(*other)).collect();
        let own = self.0.get(word).copied();
        let scores: Vec<f64> = known.iter().map(|other| self.0[*other]).chain(own).collect();
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - best).exp()).collect();
        known.get(roulette(&weights, random)).map(|other| (*other).clone())
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn words_of_fit_texts_are_preferred() {
        let synonyms = Synonyms::parse("big large\nsmall tiny");
        let mut scores = WordScores::default();
        scores.learn([("big one", -9.0), ("large one", -1.0)]);
        let random = &mut ChaCha8Rng::seed_from_u64(0);
        let improved =
            (0..50).filter(|_| scores.improve("Big dog", &synonyms, (5, 1.0), random) == "Large dog").count();
        assert!(improved > 45, "{improved}");
        // No synonym of it has been seen.
        assert_eq!(scores.improve("small dog", &synonyms, (5, 1.0), random), "small dog");
    }

    #[test]
    fn few_words_of_a_text_change_anywhere_in_it() {
        let synonyms = Synonyms::parse("big large");
        let mut scores = WordScores::default();
        scores.learn([("big", -900.0), ("large", -1.0)]);
        let random = &mut ChaCha8Rng::seed_from_u64(0);
        let text = "big ".repeat(40);
        let mut last = 0;
        for _ in 0..20 {
            let improved = scores.improve(&text, &synonyms, (5, 1.0), random);
            assert_eq!(improved.matches("large").count(), 5);
            last = last.max(improved.rfind("large").unwrap());
        }
        assert!(last > text.len() / 2, "{last}");
        assert_eq!(scores.improve(&text, &synonyms, (5, 0.0), random), text);
    }

    #[test]
    fn what_was_learnt_before_counts_half() {
        let mut scores = WordScores::default();
        scores.learn([("big", -4.0)]);
        scores.learn([("big", -2.0)]);
        assert_eq!(scores.0["big"], -3.0);
    }

    #[test]
    fn lists_are_told_apart() {
        let digest = |text: &str| Synonyms::parse(text).digest();
        assert_eq!(digest("big large\nsmall tiny"), digest("small tiny\nbig large"));
        assert_ne!(digest("big large"), digest("big huge"));
    }

    #[test]
    fn the_shipped_list_goes_both_ways() {
        let synonyms = Synonyms::shipped();
        assert!(synonyms.of("reply").contains(&"answer".to_string()));
        assert!(synonyms.of("answer").contains(&"reply".to_string()));
        assert_eq!(synonyms.of("xyz").len(), 0);
    }
}
