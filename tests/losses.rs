//! Losses against their formulas: log-probabilities by hand, from one plain sequence at a time.

#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    Adapter, AdvIpoLoss, AdvUlLoss, AdversarialTrainer, Against, AttackSettings, AwayForm, Batch, CausalLm,
    ContinuationKind, CutOff, CutOffForm, Decoder, EmbeddingAttack, Example, Floor, FloorForm, Input, Layout,
    LengthNormalisation, LossInput, Pass, Perturbation, Pgd, Place, PreferenceForm, Reduction, Result, RobustLoss,
    Site, SupervisedLoss, Term, TermValues, TrainSettings, TrainerBuilder, TrainingData, UpdateSize, UtilityLoss,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use toy::{HIDDEN, adapted, all_weights, batch, decoder, numbers, robust, useful, with_lora};

use ContinuationKind::{Harmful, Safe, Utility};

/// Harmful answers of two to four tokens; the safe one has three.
fn rows() -> Vec<Example> {
    [1, 2, 3, 6, 7].map(robust).to_vec()
}

/// Something on every token of every prompt.
fn perturbation(rows: &[Example]) -> Perturbation {
    let places: Vec<Place> = (rows.iter().enumerate())
        .flat_map(|(row, example)| (0..example.prompt().len()).map(move |offset| Place { row, offset }))
        .collect();
    let size = [places.len() as i64, HIDDEN];
    let wave = (Tensor::arange(size[0] * size[1], (Kind::Double, Device::Cpu)) * 1.3).cos() * 0.6;
    Perturbation::new(places, vec![(Site::Embeddings, wave.view(size))]).unwrap()
}

/// For each row log p of each token of its continuation of a kind: E(v) + d row by row, the continuation alone behind
/// the prompt, log-softmax of the logits one place before each token.
fn log_probs(
    model: &Decoder,
    rows: &[Example],
    kind: ContinuationKind,
    perturbation: Option<&Perturbation>,
) -> Vec<Vec<f64>> {
    let of_row = |(row, example): (usize, &Example)| {
        let answer = example.continuation(kind).unwrap().tokens.ids();
        let ids = [example.prompt().ids(), answer].concat();
        let x = model.embedding().index_select(0, &Tensor::from_slice(&ids)); // [tokens, hidden]
        if let Some(perturbation) = perturbation {
            let places = perturbation.places().iter().enumerate();
            for (at, place) in places.filter(|(_, place)| place.row == row) {
                let mut token = x.get(place.offset as i64);
                let _ = token.g_add_(&perturbation.parts()[0].1.get(at as i64));
            }
        }
        let layout = Layout::of_examples(&[example.keep(&[kind])]);
        let hidden = model.hidden(&Input::of_embeddings(x, &layout, Pass::default()).unwrap()).unwrap().last;
        let log_probs = model.logits(&hidden).unwrap().log_softmax(-1, Kind::Double); // [tokens, vocabulary]
        let first = example.prompt().len() - 1;
        (answer.iter().enumerate()).map(|(at, id)| log_probs.double_value(&[(first + at) as i64, *id])).collect()
    };
    rows.iter().enumerate().map(of_row).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn means(values: &[Vec<f64>]) -> Vec<f64> {
    values.iter().map(|values| mean(values)).collect()
}

fn of_rows(term: &Term) -> (Vec<f64>, ContinuationKind, Option<Vec<f64>>) {
    match &term.values {
        TermValues::Rows { values, kind, tokens } => (numbers(values), *kind, tokens.as_ref().map(numbers)),
        TermValues::Update(_) => panic!("{} is one number", term.name),
    }
}

fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-11 * (1.0 + expected.abs()), "{what}: {found} instead of {expected}");
    }
}

/// Far enough from each other that a test which mixed them up would fail.
fn assert_apart(one: &[f64], other: &[f64]) {
    assert!(one.iter().zip(other).all(|(one, other)| (one - other).abs() > 1e-3), "{one:?}, {other:?}");
}

fn terms_of(loss: &dyn RobustLoss, model: &Decoder, batch: &Batch, perturbation: &Perturbation) -> Result<Vec<Term>> {
    loss.terms(&LossInput { model, batch, perturbation: Some(perturbation), dropout: false })
}

#[test]
fn adv_ul_is_minus_and_plus_the_cross_entropy_under_one_perturbation() {
    let (model, rows) = (adapted(0.0), rows());
    let d = perturbation(&rows);
    let loss = AdvUlLoss::default();
    let terms = terms_of(&loss, &model, &batch(rows.clone()), &d).unwrap();
    let (harmful, safe) = (log_probs(&model, &rows, Harmful, Some(&d)), log_probs(&model, &rows, Safe, Some(&d)));
    let minus = |values: Vec<f64>| values.into_iter().map(|one| -one).collect::<Vec<_>>();
    assert_apart(&means(&safe), &means(&log_probs(&model, &rows, Safe, None)));
    assert_apart(&means(&harmful), &means(&log_probs(&model, &rows, Harmful, None)));
    let [away, toward] = terms.as_slice() else { panic!("{} terms", terms.len()) };
    assert_eq!((away.name.as_str(), toward.name.as_str()), ("away", "toward"));
    for (term, kind, expected, values) in
        [(away, Harmful, means(&harmful), &harmful), (toward, Safe, minus(means(&safe)), &safe)]
    {
        let (found, of_kind, tokens) = of_rows(term);
        assert_close(&term.name, &found, &expected);
        assert_eq!(of_kind, kind);
        let counts: Vec<f64> = values.iter().map(|values| values.len() as f64).collect();
        assert_eq!(tokens, Some(counts), "{}", term.name);
        assert_eq!(term.weight, 0.5);
    }
    let cut_off = |threshold| Some(CutOff { threshold, slope: 0.001, form: CutOffForm::Continuous });
    assert_eq!((away.cut_off, toward.cut_off), (cut_off(-5.0), cut_off(0.5)));
}

/// The whole loss of an update: 0.4 away + 0.7 toward, each cut off in the middle of its rows.
#[test]
fn adv_ul_cuts_off_rows_and_the_published_form_jumps_on_their_mean() {
    let (model, rows) = (adapted(0.0), rows());
    let d = perturbation(&rows);
    let away = means(&log_probs(&model, &rows, Harmful, Some(&d)));
    let toward: Vec<f64> = means(&log_probs(&model, &rows, Safe, Some(&d))).into_iter().map(|one| -one).collect();
    let (away_at, toward_at) = (mean(&away) + 1e-3, mean(&toward) + 1e-3);
    assert!(away.iter().any(|one| *one > away_at) && toward.iter().any(|one| *one > toward_at));
    let sum = |form, reduction| {
        let cut_off = |threshold| CutOff { threshold, slope: 0.001, form };
        let loss = AdvUlLoss {
            away_weight: 0.4,
            toward_weight: 0.7,
            away_cut_off: cut_off(away_at),
            toward_cut_off: cut_off(toward_at),
            ..AdvUlLoss::default()
        };
        let size = UpdateSize { rows: rows.len(), micro_batches: 1, micro_batches_with_rows: 1 };
        let terms = terms_of(&loss, &model, &batch(rows.clone()), &d).unwrap();
        terms.iter().map(|term| numbers(&term.reduce(reduction, size).unwrap().loss)[0]).sum::<f64>()
    };
    let cut = |values: &[f64], threshold: f64, below: fn(f64, f64) -> f64| -> f64 {
        mean(&values.iter().map(|l| if *l < threshold { below(threshold, *l) } else { *l }).collect::<Vec<_>>())
    };
    let of = |below| 0.4 * cut(&away, away_at, below) + 0.7 * cut(&toward, toward_at, below);
    let ours = of(|c, l| c + 0.001 * (l - c));
    assert_relative_eq!(sum(CutOffForm::Continuous, Reduction::PerRow), ours, max_relative = 1e-11);
    let jumping = of(|c, l| c + 0.001 * l);
    assert_relative_eq!(sum(CutOffForm::Jumping, Reduction::PerRow), jumping, max_relative = 1e-11);
    assert!((ours - jumping).abs() > 1e-3);
    // As published: one mean over all tokens of the micro-batch, and the cut-off on that.
    let mean_of_tokens = |kind| mean(&log_probs(&model, &rows, kind, Some(&d)).concat());
    let cut_mean = |l: f64, c: f64| if l < c { c + 0.001 * l } else { l };
    let published = 0.4 * cut_mean(mean_of_tokens(Harmful), away_at) + 0.7 * cut_mean(-mean_of_tokens(Safe), toward_at);
    assert_relative_eq!(sum(CutOffForm::Jumping, Reduction::MicroBatch), published, max_relative = 1e-11);
    assert!((published - jumping).abs() > 1e-3);
}

#[test]
fn unlikelihood_is_minus_log_of_one_minus_p_of_every_token() {
    let (model, rows) = (adapted(0.0), rows());
    let d = perturbation(&rows);
    let loss = AdvUlLoss { away: AwayForm::Unlikelihood, ..AdvUlLoss::default() };
    let terms = terms_of(&loss, &model, &batch(rows.clone()), &d).unwrap();
    let harmful = log_probs(&model, &rows, Harmful, Some(&d));
    let expected: Vec<f64> =
        harmful.iter().map(|row| mean(&row.iter().map(|lp| -(1.0 - lp.exp()).ln()).collect::<Vec<_>>())).collect();
    assert_close("away", &of_rows(&terms[0]).0, &expected);
}

/// Numbers that no model gave, different for each row.
fn references(count: usize) -> [Vec<f64>; 2] {
    [0.3, -0.2].map(|step| (0..count).map(|row| -2.0 + step * row as f64).collect())
}

fn with_references(batch: Batch) -> Batch {
    let [safe, harmful] = references(batch.rows()).map(|values| values.into_iter().map(|one| vec![one]).collect());
    batch.with_values("reference_safe", safe).unwrap().with_values("reference_harmful", harmful).unwrap()
}

#[test]
fn adv_ipo_is_its_formula_in_every_form() {
    let (model, rows) = (adapted(0.0), rows());
    let d = perturbation(&rows);
    let (safe, harmful) = (log_probs(&model, &rows, Safe, Some(&d)), log_probs(&model, &rows, Harmful, Some(&d)));
    let floor = mean(&harmful.concat());
    let below = |values: &[Vec<f64>]| values.concat().iter().filter(|one| **one < floor).count();
    assert!(below(&harmful) > 2 && below(&harmful) < harmful.concat().len() - 2);
    assert!(below(&safe) > 2, "a floor on the safe answer would show");
    let [reference_safe, reference_harmful] = references(rows.len());
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let dpo = PreferenceForm::Dpo { label_smoothing: 0.1 };
    for (form, with_reference, of_margin) in [
        (PreferenceForm::Ipo, true, (&|h: f64| (h - 1.0 / 0.8).powi(2)) as &dyn Fn(f64) -> f64),
        (dpo, true, &|h| -0.9 * sigmoid(0.4 * h).ln() - 0.1 * sigmoid(-0.4 * h).ln()),
        (PreferenceForm::Hinge, true, &|h| (1.0 - 0.4 * h).max(0.0)),
        (PreferenceForm::SimPo { margin: 0.3 }, false, &|h| -sigmoid(0.4 * h - 0.3).ln()),
    ] {
        for (length, per) in [
            (LengthNormalisation::Mean, mean as fn(&[f64]) -> f64),
            (LengthNormalisation::Sum, |values: &[f64]| values.iter().sum()),
        ] {
            for (floor_form, floored) in [
                (FloorForm::Clamp, (&|lp: f64| lp.max(floor)) as &dyn Fn(f64) -> f64),
                (FloorForm::Zero, &|lp| if lp < floor { 0.0 } else { lp }),
            ] {
                let what = format!("{form:?}, {length:?}, {floor_form:?}");
                let harmful_floor = Floor { value: floor, form: floor_form };
                let loss = AdvIpoLoss { form, beta: 0.4, length, harmful_floor, weight: 0.6 };
                let clean = batch(rows.clone());
                let given = if with_reference { with_references(clean) } else { clean };
                let terms = terms_of(&loss, &model, &given, &d).unwrap();
                let safe: Vec<f64> = safe.iter().map(|row| per(row)).collect();
                let floored = |row: &Vec<f64>| per(&row.iter().map(|lp| floored(*lp)).collect::<Vec<_>>());
                let harmful: Vec<f64> = harmful.iter().map(floored).collect();
                let h: Vec<f64> = (0..rows.len())
                    .map(|row| {
                        let reference = reference_safe[row] - reference_harmful[row];
                        safe[row] - harmful[row] - if with_reference { reference } else { 0.0 }
                    })
                    .collect();
                let preference: Vec<f64> = h.iter().map(|h| of_margin(*h)).collect();
                let expected = [
                    ("preference", 0.6, preference),
                    ("margin", 0.0, h),
                    ("safe_log_prob", 0.0, safe),
                    ("harmful_log_prob", 0.0, harmful),
                ];
                assert_eq!(terms.len(), expected.len());
                for (term, (name, weight, values)) in terms.iter().zip(expected) {
                    assert_eq!((term.name.as_str(), term.weight, term.cut_off), (name, weight, None));
                    let (found, kind, tokens) = of_rows(term);
                    assert_close(&format!("{what}: {name}"), &found, &values);
                    assert_eq!((kind, tokens), (Harmful, None));
                }
            }
        }
    }
}

#[test]
fn adv_ipo_wants_references_and_sim_po_does_not() {
    let (model, rows) = (adapted(0.0), rows());
    let d = perturbation(&rows);
    let error = terms_of(&AdvIpoLoss::default(), &model, &batch(rows), &d).unwrap_err().to_string();
    assert!(error.contains("reference_safe"), "{error}");
    assert_eq!(AdvIpoLoss::default().precomputes(), ["reference_safe", "reference_harmful"]);
    let sim_po = AdvIpoLoss { form: PreferenceForm::SimPo { margin: 0.5 }, ..AdvIpoLoss::default() };
    assert!(sim_po.precomputes().is_empty());
}

#[test]
fn references_are_the_original_models_without_perturbation_and_without_floor() {
    let (model, original, rows) = (adapted(0.0), decoder(), rows());
    let floor = Floor { value: -0.01, form: FloorForm::Clamp };
    for length in [LengthNormalisation::Mean, LengthNormalisation::Sum] {
        let loss = AdvIpoLoss { length, harmful_floor: floor, ..AdvIpoLoss::default() };
        let given = loss.precompute(&model, &batch(rows.clone())).unwrap();
        for ((name, found), kind) in given.iter().zip([Safe, Harmful]) {
            let of = |model: &Decoder| -> Vec<f64> {
                let rows = log_probs(model, &rows, kind, None);
                let per = |row: &Vec<f64>| match length {
                    LengthNormalisation::Mean => mean(row),
                    LengthNormalisation::Sum => row.iter().sum(),
                };
                rows.iter().map(per).collect()
            };
            assert_close(name, &found.concat(), &of(&original));
            assert_apart(&of(&original), &of(&model));
        }
        assert_eq!(given.iter().map(|one| one.0.as_str()).collect::<Vec<_>>(), loss.precomputes());
    }
}

#[test]
fn the_supervised_loss_is_the_mean_cross_entropy_and_if_asked_that_of_first_tokens() {
    let (model, rows) = (adapted(0.0), [0, 1, 2].map(useful).to_vec());
    let input = LossInput { model: &model, batch: &batch(rows.clone()), perturbation: None, dropout: false };
    let terms = SupervisedLoss::default().terms(&input).unwrap();
    let expected: Vec<f64> = means(&log_probs(&model, &rows, Utility, None)).into_iter().map(|one| -one).collect();
    let (found, kind, tokens) = of_rows(&terms[0]);
    assert_close("utility", &found, &expected);
    assert_eq!((terms.len(), terms[0].weight, terms[0].cut_off, kind), (1, 1.0, None, Utility));
    assert_eq!(tokens, Some(vec![2.0, 3.0, 2.0]));

    let terms = SupervisedLoss { first_weight: 0.3, ..SupervisedLoss::default() }.terms(&input).unwrap();
    let expected: Vec<f64> = log_probs(&model, &rows, Utility, None).iter().map(|row| -row[0]).collect();
    let [whole, first] = &terms[..] else { panic!("two terms") };
    assert_close("utility", &of_rows(whole).0, &found);
    let (found, kind, tokens) = of_rows(first);
    assert_close("utility_first", &found, &expected);
    assert_eq!((first.name.as_str(), first.weight, first.cut_off, kind), ("utility_first", 0.3, None, Utility));
    assert_eq!(tokens, None);
}

/// KL to the original model on harmful answers.
struct ToOriginal;

impl RobustLoss for ToOriginal {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let targets = input.batch.targets(Harmful)?;
        let of = |hidden: Tensor| hidden.index_select(0, &targets.predictors);
        let kl = input.model.kl(&of(input.hidden(&[])?.last), &of(input.reference_hidden(&[])?.last))?;
        let values = TermValues::Rows { values: targets.mean_per_row(&kl)?, kind: Harmful, tokens: None };
        Ok(vec![Term { name: "kl".into(), weight: 1.0, values, cut_off: None }])
    }
    fn uses_reference(&self) -> bool {
        true
    }
}

#[test]
fn a_loss_that_compares_with_the_original_model_needs_an_adapter() {
    let settings = |utility_share| TrainSettings { batch_size: 2, utility_share, ..TrainSettings::default() };
    let data = || TrainingData { robust: vec![robust(1), robust(2)], utility: vec![useful(1), useful(2)] };
    let on_robust = |model| {
        let builder = AdversarialTrainer::builder(model).data(data()).settings(settings(0.0));
        builder.robust(Box::new(ToOriginal) as Box<dyn RobustLoss>).build()
    };
    let on_utility = |model| {
        let builder = AdversarialTrainer::builder(model).data(data()).settings(settings(1.0));
        builder.utility(SupervisedLoss { against: Against::Reference, ..SupervisedLoss::default() }).build()
    };
    for build in [&on_robust as &dyn Fn(Decoder) -> Result<AdversarialTrainer<Decoder>>, &on_utility] {
        let error = build(all_weights()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("original") && error.contains("adapter"), "{error}");
        assert!(build(with_lora(0.0)).is_ok());
    }
}

/// KL(original || model) of each row's targets of a kind, from both models' logits.
fn kl_to_original(model: &Decoder, rows: &Batch, kind: ContinuationKind, d: Option<&Perturbation>) -> Vec<Vec<f64>> {
    let targets = rows.targets(kind).unwrap();
    let log_softmax = |model: &Decoder, d: Option<&Perturbation>| {
        let hidden = model.hidden(&Input::of_batch(model, rows, d, Pass::default()).unwrap()).unwrap();
        model.logits(&hidden.last.index_select(0, &targets.predictors)).unwrap().log_softmax(-1, Kind::Double)
    };
    let (ours, theirs) = (log_softmax(model, d), log_softmax(&decoder(), None));
    let of_tokens = numbers(&(theirs.exp() * (&theirs - &ours)).sum_dim_intlist(-1, false, Kind::Double));
    let of_row = |row| (targets.list.iter().zip(&of_tokens)).filter(move |(one, _)| one.row == row).map(|(_, kl)| *kl);
    (0..rows.rows()).map(|row| of_row(row).collect()).collect()
}

#[test]
fn a_loss_that_compares_with_the_original_model_is_its_formula() {
    let (model, rows) = (adapted(0.0), rows());
    let (rows, d) = (batch(rows.clone()), perturbation(&rows));
    let input = LossInput { model: &model, batch: &rows, perturbation: Some(&d), dropout: false };
    let terms = ToOriginal.terms(&input).unwrap();
    let expected = means(&kl_to_original(&model, &rows, Harmful, Some(&d)));
    assert!(expected.iter().all(|value| *value > 1e-3), "{expected:?}");
    assert_close("kl", &of_rows(&terms[0]).0, &expected);
}

#[test]
fn the_supervised_loss_against_the_original_model_is_the_kl_of_its_predictions() {
    let (model, rows) = (adapted(0.0), batch([0, 1, 2].map(useful).to_vec()));
    let input = LossInput { model: &model, batch: &rows, perturbation: None, dropout: false };
    let loss = SupervisedLoss { weight: 2.0, first_weight: 0.3, against: Against::Reference };
    let terms = loss.terms(&input).unwrap();
    let expected = kl_to_original(&model, &rows, Utility, None);
    assert!(expected.concat().iter().all(|value| *value > 1e-3), "{expected:?}");
    let [whole, first] = &terms[..] else { panic!("two terms") };
    assert_eq!((whole.weight, first.weight), (2.0, 0.3));
    assert_close("utility", &of_rows(whole).0, &means(&expected));
    assert_close("utility_first", &of_rows(first).0, &expected.iter().map(|row| row[0]).collect::<Vec<_>>());

    let untrained = LossInput { model: &with_lora(0.0), ..input };
    for term in loss.terms(&untrained).unwrap() {
        assert_eq!(of_rows(&term).0, [0.0; 3], "an adapter that adds nothing yet is the original model");
    }
}

#[test]
fn reference_hidden_states_are_the_original_models_on_the_unperturbed_rows() {
    let (model, rows) = (adapted(0.0), rows());
    let (rows, d) = (batch(rows.clone()), perturbation(&rows));
    let input = LossInput { model: &model, batch: &rows, perturbation: Some(&d), dropout: true };
    let found = input.reference_hidden(&[0]).unwrap();
    let pass = Pass { taps: &[0], ..Pass::default() };
    let original = decoder();
    let expected = original.hidden(&Input::of_batch(&original, &rows, None, pass).unwrap()).unwrap();
    assert_close("last", &numbers(&found.last), &numbers(&expected.last));
    assert_close("tapped", &numbers(&found.tapped[0]), &numbers(&expected.tapped[0]));
    assert!(!found.last.requires_grad());
    let off = Pass { adapter: Adapter::Off, ..Pass::default() };
    let perturbed = model.hidden(&Input::of_batch(&model, &rows, Some(&d), off).unwrap()).unwrap();
    assert!((perturbed.last - found.last).abs().max().double_value(&[]) > 1e-3);
}

#[test]
fn settings_out_of_range_are_refused_when_the_trainer_is_built() {
    let cut_off = |threshold| CutOff { threshold, slope: 0.001, form: CutOffForm::Continuous };
    let floor = |value| AdvIpoLoss { harmful_floor: Floor { value, form: FloorForm::Clamp }, ..AdvIpoLoss::default() };
    let form = |form| AdvIpoLoss { form, ..AdvIpoLoss::default() };
    let ul = AdvUlLoss::default;
    let robust_losses: Vec<(Box<dyn RobustLoss>, &str)> = vec![
        (Box::new(AdvIpoLoss { beta: -1.0, ..AdvIpoLoss::default() }), "loss.adv_ipo.beta = -1"),
        (Box::new(AdvIpoLoss { weight: f64::NAN, ..AdvIpoLoss::default() }), "loss.adv_ipo.weight = NaN"),
        (Box::new(floor(f64::NAN)), "loss.adv_ipo.harmful_floor.value = NaN"),
        (Box::new(floor(0.5)), "loss.adv_ipo.harmful_floor.value = 0.5"),
        (Box::new(form(PreferenceForm::SimPo { margin: f64::NAN })), "loss.adv_ipo.form.sim_po.margin = NaN"),
        (
            Box::new(form(PreferenceForm::Dpo { label_smoothing: 0.5 })),
            "loss.adv_ipo.form.dpo.label_smoothing = 0.5: must be at least 0 and below 0.5",
        ),
        (
            Box::new(AdvUlLoss { away_cut_off: cut_off(f64::NAN), ..ul() }),
            "loss.adv_ul.away_cut_off.threshold = NaN: must be finite",
        ),
        (
            Box::new(AdvUlLoss { toward_cut_off: cut_off(f64::INFINITY), ..ul() }),
            "loss.adv_ul.toward_cut_off.threshold = inf: must be finite",
        ),
        (Box::new(AdvUlLoss { toward_weight: -0.5, ..ul() }), "loss.adv_ul.toward_weight = -0.5"),
    ];
    let with_utility = |loss: Box<dyn RobustLoss>, utility: SupervisedLoss| {
        AdversarialTrainer::builder(with_lora(0.0))
            .robust(loss)
            .utility(utility)
            .data(TrainingData { robust: vec![robust(1)], utility: vec![useful(1)] })
            .settings(TrainSettings { batch_size: 2, utility_share: 0.5, ..TrainSettings::default() })
    };
    let with = |loss, weight| with_utility(loss, SupervisedLoss { weight, ..SupervisedLoss::default() });
    let refused = |builder: TrainerBuilder<Decoder>| builder.build().map(|_| ()).unwrap_err().to_string();
    for (loss, expected) in robust_losses {
        let error = refused(with(loss, 1.0));
        assert!(error.contains(expected), "{error} does not say {expected}");
    }
    let good = || Box::new(floor(f64::NEG_INFINITY)) as Box<dyn RobustLoss>;
    assert_eq!(refused(with(good(), -1.0)), "utility.weight = -1: must be at least 0 and finite");
    let first = SupervisedLoss { first_weight: f64::NAN, ..SupervisedLoss::default() };
    assert_eq!(refused(with_utility(good(), first)), "utility.first_weight = NaN: must be at least 0 and finite");
    let attack = |steps| {
        let boxed = Box::new(Pgd { steps, ..Pgd::default() }) as Box<dyn EmbeddingAttack>;
        with(good(), 1.0).attack(boxed, AttackSettings::default())
    };
    assert_eq!(refused(attack(0)), "attack.steps = 0: must be at least 1");
    assert!(attack(1).build().is_ok());
}
