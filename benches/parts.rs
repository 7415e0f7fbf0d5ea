//! What single optimisations save: each pair is the same work without and with one of them.
//!
//! ```sh
//! cargo bench --bench parts -- --quick
//! ```
//!
//! | group | without | with |
//! |---|---|---|
//! | `adapter` | an iteration of the attack with the adapter beside the weights | merged into them |
//! | `harmful-alone` | an iteration over both continuations | over the harmful one |
//! | `shared-prompt` | the losses' pass over each continuation with a prompt of its own, forward and back | behind one prompt |
//! | `like-lengths` | four such passes over rows of 56 to 536 tokens as they come | sorted by length |
//! | `shared-beginning` | the same pass over 16 chats of 54 to 84 tokens that begin with the same 21, each whole | those computed once |
//! | `references` | the reference values of the rows, which are otherwise read from what was computed once | nothing |

mod common;

use advtrain::{
    Adapter, AdvIpoLoss, Batch, CausalLm,
    ContinuationKind::{self, Harmful, Safe},
    Decoder, Example, Input, Last, Pass, RobustLoss, TokenKind, Tokens, TrainableLm,
    tch::{Tensor, no_grad},
};
use common::{Lengths, device, dtypes, harmful_rows, shapes, synchronize, warmed};
use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};

/// Prompts of a micro-batch of chats, in tokens.
const CHATS: [usize; 8] = [32, 64, 96, 128, 192, 256, 384, 512];
/// Tokens of a template with its system prompt, SmolLM2's.
const BEGINNING: usize = 21;

/// The log-probabilities of the targets of these kinds, summed, and the gradients of `towards`.
fn pass(model: &dyn CausalLm, batch: &Batch, kinds: &[ContinuationKind], input: &Input, towards: &[Tensor]) {
    let hidden = model.hidden(input).expect("the pass runs");
    let sums = kinds.iter().map(|kind| {
        let targets = batch.targets(*kind).expect("targets");
        let predicting = hidden.predicting(&targets).expect("predictors");
        model.log_probs(&predicting, &targets.ids).expect("log-probabilities").sum(None)
    });
    let gradients = Tensor::run_backward(&[sums.reduce(|a, b| a + b).expect("a kind")], towards, false, false);
    drop(gradients);
    synchronize();
}

const PREDICTING: Pass = Pass { adapter: Adapter::On, dropout: false, taps: &[], last: Last::Predictors };

/// Rows each whole: of embeddings nobody knows which are the same.
fn whole(batch: &Batch, embeddings: Tensor) -> Input<'_> {
    Input::of_embeddings(embeddings, batch.layout(), PREDICTING).expect("embeddings fit")
}

/// The same rows, their first tokens replaced by those of the first.
fn beginning_alike(rows: &[Example]) -> Vec<Example> {
    let beginning = &rows[0].prompt().ids()[..BEGINNING];
    let alike = |row: &Example| {
        let ids = [beginning, &row.prompt().ids()[BEGINNING..]].concat();
        row.with_prompt(Tokens::of_kind(ids, TokenKind::User)).expect("a row")
    };
    rows.iter().map(alike).collect()
}

fn batch(examples: &[Example], kinds: &[ContinuationKind]) -> Batch {
    Batch::new(examples.iter().map(|example| example.keep(kinds)).collect(), device()).expect("rows")
}

/// The losses' pass over whole rows: gradients of the adapter.
fn losses<'m>(model: &'m Decoder, examples: &[Example], kinds: &[ContinuationKind]) -> impl FnMut() + use<'m> {
    adapter_pass(model, examples, kinds, |model, batch| whole(batch, model.embed(batch.ids()).expect("ids")))
}

/// The same, what rows begin with computed once.
fn sharing<'m>(model: &'m Decoder, examples: &[Example], kinds: &[ContinuationKind]) -> impl FnMut() + use<'m> {
    adapter_pass(model, examples, kinds, |model, batch| {
        let input = Input::of_batch(model, batch, None, PREDICTING).expect("ids");
        assert!(input.shared() >= BEGINNING);
        input
    })
}

fn adapter_pass<'m>(
    model: &'m Decoder,
    examples: &[Example],
    kinds: &[ContinuationKind],
    input: for<'b> fn(&Decoder, &'b Batch) -> Input<'b>,
) -> impl FnMut() + use<'m> {
    let batch = batch(examples, kinds);
    let towards: Vec<Tensor> = model.parameters().into_iter().map(|one| one.tensor).collect();
    let kinds = kinds.to_vec();
    move || pass(model, &batch, &kinds, &input(model, &batch), &towards)
}

/// The attack's pass: gradients of the embeddings.
fn iteration<'m>(model: &'m dyn CausalLm, examples: &[Example], kinds: &[ContinuationKind]) -> impl FnMut() + use<'m> {
    let batch = batch(examples, kinds);
    move || {
        let embeddings = model.embed(batch.ids()).expect("ids").detach().set_requires_grad(true);
        let input = whole(&batch, embeddings.shallow_clone());
        pass(model, &batch, &[Harmful], &input, std::slice::from_ref(&embeddings));
    }
}

fn parts(criterion: &mut Criterion) {
    for shape in shapes() {
        let model = &common::model(shape, dtypes()[0].0);
        let rows = harmful_rows(Lengths::Equal);
        let both = [Harmful, Safe];

        // Adapter and weights apart as dropout needs them, and as one.
        let [beside, merged] =
            [true, false].map(|apart| model.frozen(apart).expect("it freezes").expect("a decoder does"));
        let (beside, merged) = (&*beside, &*merged);
        let alone = || iteration(merged, &rows, &[Harmful]);
        pair(criterion, "adapter", shape, iteration(beside, &rows, &[Harmful]), alone());
        pair(criterion, "harmful-alone", shape, iteration(merged, &rows, &both), alone());

        let mut parts = both.map(|kind| losses(model, &rows, &[kind]));
        let apart = move || parts.iter_mut().for_each(|part| part());
        pair(criterion, "shared-prompt", shape, apart, losses(model, &rows, &both));

        // As rows come: each micro-batch has short and long ones. Longer than elsewhere, as chats are.
        let ragged: Vec<Vec<Example>> = (0..4).map(|_| common::rows_of_lengths(&CHATS)).collect();
        let mut sorted = ragged.concat();
        sorted.sort_by_key(Example::len);
        let all = |parts: Vec<Vec<Example>>| {
            let mut parts: Vec<_> = parts.iter().map(|rows| losses(model, rows, &[Harmful])).collect();
            move || parts.iter_mut().for_each(|part| part())
        };
        let sorted = sorted.chunks(CHATS.len()).map(<[_]>::to_vec).collect();
        pair(criterion, "like-lengths", shape, all(ragged), all(sorted));

        let chats = beginning_alike(&common::rows_of_lengths(&(0..16).map(|row| 30 + 2 * row).collect::<Vec<_>>()));
        let (each, once) = (losses(model, &chats, &[Harmful]), sharing(model, &chats, &[Harmful]));
        pair(criterion, "shared-beginning", shape, each, once);

        let batch = batch(&rows, &both);
        let references = || {
            no_grad(|| AdvIpoLoss::default().precompute(model, &batch)).expect("the reference answers");
            synchronize();
        };
        pair(criterion, "references", shape, references, || {});
    }
}

/// Times the same work without and with an optimisation.
fn pair(criterion: &mut Criterion, name: &str, shape: &str, without: impl FnMut(), with: impl FnMut()) {
    let (mut without, mut with) = (warmed(without), warmed(with));
    let mut group = criterion.benchmark_group(format!("parts-{name}-{shape}"));
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.bench_function(BenchmarkId::from_parameter("without"), |bencher| bencher.iter(&mut without));
    group.bench_function(BenchmarkId::from_parameter("with"), |bencher| bencher.iter(&mut with));
    group.finish();
}

criterion_group!(benches, parts);
criterion_main!(benches);
