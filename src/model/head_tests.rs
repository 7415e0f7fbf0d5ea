//! The chunked forms against libtorch's plain log_softmax, on chunks of one row, of three, and of all.

use serde_json::json;
use tch::Device;

use super::*;
use crate::{CausalLm, Decoder, TrainableLm};

const TOKENS: i64 = 7;
const VOCABULARY: i64 = 40;
/// Numbers in a chunk: fewer than one row of logits, three rows and a bit, more than all.
const CHUNKS: [i64; 3] = [11, 130, 10_000];

fn decoder(tied: bool) -> Decoder {
    decoder_in(Kind::Double, tied)
}

fn decoder_in(kind: Kind, tied: bool) -> Decoder {
    let config = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": tied
    });
    Decoder::random(config, 0.7, 5, kind, Device::Cpu).unwrap()
}

/// Random numbers that do not depend on libtorch's generator, which other tests may use.
fn random(size: [i64; 2], name: &str) -> Tensor {
    use rand_distr::{Distribution, StandardNormal};
    let count = (size[0] * size[1]) as usize;
    let values: Vec<f64> = StandardNormal.sample_iter(crate::digest::generator(9, "test", name)).take(count).collect();
    Tensor::from_slice(&values).view(size)
}

fn leaf(size: [i64; 2], name: &str) -> Tensor {
    random(size, name).set_requires_grad(true)
}

fn ids() -> Tensor {
    Tensor::from_slice(&[0i64, 39, 7, 7, 21, 3, 39])
}

/// What comes from above in a backward pass: one arbitrary weight per token.
fn upstream() -> Tensor {
    random([TOKENS, 1], "upstream").squeeze_dim(1)
}

fn gradient(values: &Tensor, towards: &[&Tensor]) -> Vec<Tensor> {
    Tensor::run_backward(&[(values * upstream()).sum(Kind::Double)], towards, false, false)
}

fn plain_log_softmax(head: &Tensor, hidden: &Tensor) -> Tensor {
    hidden.matmul(&head.tr()).log_softmax(-1, Kind::Double)
}

fn plain_log_probs(head: &Tensor, hidden: &Tensor) -> Tensor {
    plain_log_softmax(head, hidden).gather(1, &ids().unsqueeze(1), false).squeeze_dim(1)
}

/// Sum over the vocabulary of p_reference (log p_reference - log p).
fn plain_kl(head: &Tensor, hidden: &Tensor, reference: &Tensor) -> Tensor {
    let reference = plain_log_softmax(head, &reference.detach());
    (reference.exp() * (&reference - plain_log_softmax(head, hidden))).sum_dim_intlist(-1, false, Kind::Double)
}

fn assert_same(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.size(), expected.size());
    let difference = (found - expected).abs().max().double_value(&[]);
    assert!(difference < 1e-10, "differs by {difference:e}");
}

#[test]
fn log_probs_in_chunks_are_the_plain_ones() {
    let model = decoder(false);
    let head = model.head.as_ref().unwrap();
    for chunk in CHUNKS {
        let (hidden, plain) = (leaf([TOKENS, 8], "hidden"), leaf([TOKENS, 8], "hidden"));
        let expected = plain_log_probs(head, &plain);
        let expected_gradient = gradient(&expected, &[&plain]).remove(0);
        for odds in [
            log_odds(&model, &hidden, &ids(), chunk).unwrap(),
            log_odds_of_linear(head, &hidden, &ids(), Kind::Double, chunk).unwrap(),
        ] {
            let found = odds.log_sigmoid();
            assert_same(&found, &expected);
            assert_same(&gradient(&found, &[&hidden])[0], &expected_gradient);
        }
    }
}

#[test]
fn kl_in_chunks_is_the_formula() {
    let model = decoder(false);
    let head = model.head.as_ref().unwrap();
    for chunk in CHUNKS {
        let (hidden, plain) = (leaf([TOKENS, 8], "hidden"), leaf([TOKENS, 8], "hidden"));
        let reference = leaf([TOKENS, 8], "reference");
        let found = kl(&model, &hidden, &reference, chunk).unwrap();
        let expected = plain_kl(head, &plain, &reference);
        assert_same(&found, &expected);
        let gradients = gradient(&found, &[&hidden]);
        assert_same(&gradients[0], &gradient(&expected, &[&plain])[0]);
        assert!(!reference.grad().defined());
        // Of a distribution to itself: 0, and at its least.
        let none = kl(&model, &hidden, &hidden, chunk).unwrap();
        assert_same(&none, &Tensor::zeros([TOKENS], (Kind::Double, Device::Cpu)));
        assert_same(&gradient(&none, &[&hidden])[0], &hidden.zeros_like());
    }
}

#[test]
fn without_gradients_the_values_are_the_same_and_nothing_is_recorded() {
    let model = decoder(true);
    let hidden = leaf([TOKENS, 8], "hidden");
    let reference = random([TOKENS, 8], "reference");
    let head = model.embedding().shallow_clone();
    let _guard = tch::no_grad_guard();
    for chunk in CHUNKS {
        for odds in [
            log_odds(&model, &hidden, &ids(), chunk).unwrap(),
            log_odds_of_linear(&head, &hidden, &ids(), Kind::Double, chunk).unwrap(),
        ] {
            assert!(!odds.requires_grad());
            assert_same(&odds.log_sigmoid(), &plain_log_probs(&head, &hidden));
        }
        let found = kl(&model, &hidden, &reference, chunk).unwrap();
        assert!(!found.requires_grad());
        assert_same(&found, &plain_kl(&head, &hidden, &reference));
    }
}

#[test]
fn a_trained_head_gets_its_gradient() {
    for tied in [false, true] {
        let mut model = decoder(tied);
        model.train_all_weights().unwrap();
        let name = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let head = model.parameters().into_iter().find(|one| one.name == name).unwrap().tensor;
        let hidden = leaf([TOKENS, 8], "hidden");
        let reference = random([TOKENS, 8], "reference");
        for (found, expected) in [
            (CausalLm::log_probs(&model, &hidden, &ids()).unwrap(), plain_log_probs(&head, &hidden)),
            (log_odds(&model, &hidden, &ids(), 11).unwrap().log_sigmoid(), plain_log_probs(&head, &hidden)),
            // The reference is a fixed distribution, so its own path to the head does not count.
            (kl(&model, &hidden, &reference, 11).unwrap(), {
                let fixed = plain_log_softmax(&head.detach(), &reference);
                let own = plain_log_softmax(&head, &hidden);
                (fixed.exp() * (&fixed - own)).sum_dim_intlist(-1, false, Kind::Double)
            }),
        ] {
            assert_same(&found, &expected);
            let towards = [&hidden, &head];
            for (found, expected) in gradient(&found, &towards).iter().zip(gradient(&expected, &towards)) {
                assert_same(found, &expected);
            }
        }
    }
}

#[test]
fn no_token_gives_no_number_and_wrong_counts_are_named() {
    let model = decoder(false);
    let none = Tensor::zeros([0, 8], (Kind::Double, Device::Cpu));
    let found = CausalLm::log_probs(&model, &none, &Tensor::zeros([0], (Kind::Int64, Device::Cpu))).unwrap();
    assert_eq!(found.size(), [0]);
    assert_eq!(CausalLm::kl(&model, &none, &none).unwrap().size(), [0]);
    let hidden = random([3, 8], "hidden");
    let error = CausalLm::log_probs(&model, &hidden, &ids()).unwrap_err().to_string();
    assert_eq!(error, "ids: expected 3, one per hidden state, found 7");
    let error = CausalLm::kl(&model, &hidden, &random([4, 8], "reference")).unwrap_err().to_string();
    assert_eq!(error, "reference hidden states: expected 3, one per hidden state, found 4");
}

#[test]
fn complements_in_chunks_are_the_formula() {
    let model = decoder(false);
    let head = model.head.as_ref().unwrap();
    for chunk in CHUNKS {
        let (hidden, plain) = (leaf([TOKENS, 8], "hidden"), leaf([TOKENS, 8], "hidden"));
        let found = log_odds_of_linear(head, &hidden, &ids(), Kind::Double, chunk).unwrap().neg().log_sigmoid();
        let expected = (-plain_log_probs(head, &plain).exp()).log1p();
        assert_same(&found, &expected);
        assert_same(&gradient(&found, &[&hidden])[0], &gradient(&expected, &[&plain])[0]);
    }
}

/// In float32, p of a logit of 30 above the others is 1: log(1 - p) is the others' log-sum less 30, and its slope is that of
/// the logit. log p is what a series gives, not 0.
#[test]
fn a_certain_token_keeps_its_digits() {
    let model = decoder_in(Kind::Float, false);
    let mut head = model.head.as_ref().unwrap().shallow_clone();
    {
        let _guard = tch::no_grad_guard();
        let _ = head.zero_();
        let _ = head.narrow(0, 7, 1).fill_(1.0);
    }
    let others = (VOCABULARY - 1) as f64;
    let ids = Tensor::from_slice(&[7i64]);
    let of = |value: fn(&Decoder, &Tensor, &Tensor) -> Result<Tensor>| {
        let hidden = Tensor::full([1, 8], 30.0 / 8.0, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let found = value(&model, &hidden, &ids).unwrap();
        let slope = Tensor::run_backward(&[found.sum(Kind::Float)], &[&hidden], false, false).remove(0);
        (found.double_value(&[0]), slope.double_value(&[0, 3]))
    };
    let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-5, "{found}, not {expected}");
    let (value, slope) = of(|model, hidden, ids| model.log_complements(hidden, ids));
    near(value, others.ln() - 30.0);
    near(slope, -1.0);
    let (value, slope) = of(|model, hidden, ids| model.log_probs(hidden, ids));
    near(value, -others * (-30f64).exp());
    near(slope, others * (-30f64).exp());
}
