use ctxserve_backend::{KvDtype, KvGroup};
use proptest::prelude::*;

use super::*;

fn plan(window: usize, pages: [usize; 2]) -> KvPlan {
    let groups = vec![
        KvGroup { window: Some(window), layers: vec![0], dtype: KvDtype::F32 },
        KvGroup { window: None, layers: vec![1], dtype: KvDtype::F32 },
    ];
    let spec = KvSpec { page_size: 4, kv_heads: 1, head_dim: 1, groups };
    KvPlan { spec, pages: pages.to_vec() }
}

fn history(tokens: &[TokenId]) -> History<'_> {
    History { prompt: tokens, generated: &[] }
}

/// Computes `tokens` in chunks, from what is known of them on. Returns how many were known.
fn compute(lease: &mut KvLease, salt: &Salt, tokens: &[TokenId], chunk: usize) -> usize {
    lease.seek(salt, &history(tokens), tokens.len().saturating_sub(1) / 4);
    let known = lease.attach(salt);
    lease.keep(tokens.len() / 4);
    let mut at = known;
    while at < tokens.len() {
        let next = (at + chunk).min(tokens.len());
        assert!(lease.grow(next), "no room at {at}");
        lease.publish(&history(tokens), next);
        lease.slide(next);
        at = next;
    }
    known
}

fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    (0..count as u32).map(|at| seed * 1000 + at).collect()
}

#[test]
fn growth_is_all_groups_or_none() {
    let pools = KvPools::new(&plan(4, [8, 2]), true);
    let mut lease = pools.lease();
    assert!(!lease.grow(9));
    assert_eq!(pools.used(), [0, 0]);
    assert!(lease.grow(8));
    assert_eq!(pools.used(), [2, 2]);
    drop(lease);
    assert_eq!(pools.used(), [0, 0]);
}

/// OPS-07: of a windowed group a sequence holds its window and a bounded number of pages more.
#[test]
fn a_windowed_group_holds_the_window_and_little_more() {
    let plan = plan(6, [10, 100]);
    let pools = KvPools::new(&plan, true);
    let mut lease = pools.lease();
    for position in 0..200 {
        assert!(lease.grow(position + 1), "no page for {position}");
        let first = plan.spec.first_visible(0, position);
        for seen in first..=position {
            assert!(lease.tables()[0].locate(seen, 4).is_some(), "{seen} unseen at {position}");
        }
        assert!(lease.held(0) <= plan.spec.pages_for(0, position + 1, 1));
        lease.slide(position + 1);
    }
    assert_eq!(lease.held(1), 50);
}

#[test]
fn a_page_of_tokens_may_lie_across_the_turn() {
    let history = History { prompt: &[0, 1, 2, 3, 4, 5], generated: &[6, 7, 8, 9, 10, 11] };
    let pages: Vec<_> = (0..3).map(|page| history.page(page, 4).into_owned()).collect();
    assert_eq!(pages, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]);
    let other = History { prompt: &[0, 1, 2, 3, 4, 5, 6, 7, 9], generated: &[] };
    assert_eq!((history.common(&other), other.common(&history)), (8, 8));
    let parted = History { prompt: &[0, 1, 5], generated: &[] };
    assert_eq!((history.common(&parted), parted.common(&parted)), (2, 3));
}

/// The second to ask has the first one's pages: those of full attention all, those of the window where it goes on.
#[test]
fn a_prompt_is_taken_up_where_its_window_is_kept() {
    let plan = plan(6, [30, 60]);
    let pools = KvPools::new(&plan, true);
    let (mut one, mut other, prompt) = (pools.lease(), pools.lease(), tokens(1, 42));
    assert_eq!(compute(&mut one, &None, &prompt, 16), 0);
    assert_eq!(compute(&mut other, &None, &prompt, 16), 40);
    assert_eq!(one.tables()[1].pages[..10], other.tables()[1].pages[..10]);
    assert_eq!(pools.used()[1], 12, "a page each beside the ten they share");
    assert_eq!(pools.check([&one, &other].into_iter()), Ok(()));
    // Another salt knows nothing of it.
    let mut stranger = pools.lease();
    assert_eq!(compute(&mut stranger, &Some("b".into()), &prompt, 16), 0);
    assert!(stranger.is_opening(&history(&prompt)));
    drop((one, stranger));
    assert_eq!(pools.check([&other].into_iter()), Ok(()));

    // A branch: full attention knows it all, the window is gone; the second time it is kept.
    let mut branch = prompt[..25].to_vec();
    branch.extend(tokens(2, 20));
    let mut third = pools.lease();
    assert_eq!(compute(&mut third, &None, &branch, 16), 0);
    assert_eq!((third.known().deepest, third.known().pages), (6, 0));
    branch.truncate(25);
    branch.extend(tokens(3, 20));
    let mut fourth = pools.lease();
    assert_eq!(compute(&mut fourth, &None, &branch, 16), 24);
    drop((other, third));
    assert_eq!(pools.check([&fourth].into_iter()), Ok(()));
    drop(fourth);
    assert_eq!(pools.used(), [0, 0]);
    assert!(pools.kept()[1] > 15, "{:?}", pools.kept());
}

/// What is kept gives way, leaves first and the oldest first, and is known to have been there.
#[test]
fn what_is_kept_gives_way() {
    let pools = KvPools::new(&plan(6, [40, 20]), true);
    for seed in 1..4 {
        let mut lease = pools.lease();
        assert_eq!(compute(&mut lease, &None, &tokens(seed, 24), 8), 0);
        lease.retire(&history(&tokens(seed, 24)), 24);
    }
    assert_eq!((pools.used(), pools.kept()[1]), (vec![0, 0], 18));
    let mut big = pools.lease();
    assert_eq!(compute(&mut big, &None, &tokens(9, 20), 8), 0);
    let known = |seed| pools.lease().seek(&None, &history(&tokens(seed, 24)), 6).deepest;
    assert_eq!([known(1), known(2), known(3)], [3, 6, 6], "three pages were missing");
    let mut lease = pools.lease();
    lease.seek(&None, &history(&tokens(1, 24)), 6);
    assert_eq!(lease.lost(&None, &history(&tokens(1, 24)), 6), Some((Lost::Evicted, 3)));
    assert_eq!(lease.lost(&None, &history(&tokens(1, 24)), 5), Some((Lost::Evicted, 2)));
    // What is in use stays, whatever is asked for.
    assert!(!lease.grow(16 * 4));
    assert!(lease.grow(15 * 4));
    assert_eq!([known(1), known(2), known(3)], [0, 0, 0]);
    assert_eq!(big.published(), 5);
    assert_eq!(pools.check([&big, &lease].into_iter()), Ok(()));
}

/// A reset takes all that nobody uses, and hides the rest.
#[test]
fn after_a_reset_nothing_is_found() {
    let pools = KvPools::new(&plan(6, [40, 40]), true);
    let (prompt, gone) = (tokens(1, 26), tokens(2, 26));
    let mut lease = pools.lease();
    compute(&mut lease, &None, &gone, 26);
    lease.retire(&history(&gone), 26);
    compute(&mut lease, &None, &prompt, 26);
    let mut other = pools.lease();
    assert_eq!(other.seek(&None, &history(&prompt), 6).pages, 6);
    pools.reset();
    assert_eq!(pools.kept(), [0, 0]);
    assert_eq!(other.seek(&None, &history(&prompt), 6).deepest, 0, "found by what it knew");
    assert_eq!(other.seek(&None, &history(&gone), 6).deepest, 0);
    assert_eq!(other.lost(&None, &history(&gone), 6), Some((Lost::Reset, 6)));
    assert_eq!(compute(&mut other, &None, &prompt, 26), 0);
    assert_eq!(pools.check([&lease, &other].into_iter()), Ok(()));
    lease.retire(&history(&prompt), 26);
    assert_eq!(pools.check([&other].into_iter()), Ok(()));
    drop(other);
    assert_eq!(pools.used(), [0, 0]);
    assert_eq!(pools.check(std::iter::empty()), Ok(()));
}

proptest! {
    /// Random leases of prompts that begin alike, which grow, end early, are kept, salted and reset: no page is lost
    /// or in two places, nothing in use is evicted, and nothing is in use once all are gone.
    #[test]
    fn every_page_is_in_one_place(
        pages in prop::array::uniform2(1_usize..24),
        window in 1_usize..20,
        actions in prop::collection::vec((0_usize..5, 0_usize..8, 0_usize..40, 0_usize..4), 1..120),
    ) {
        let pools = KvPools::new(&plan(window, pages), true);
        // Prompts part from one another at 9, 20 and 33.
        let prompts = [0, 9, 20, 33].map(|parted| {
            (0..120).map(|at| if at < parted { 1 } else { at + 1000 * parted }).collect::<Vec<TokenId>>()
        });
        let salts = [None, None, None, Some("a".into())];
        let mut leases: Vec<Option<(KvLease, usize, usize)>> = vec![None, None, None, None, None];
        for (which, action, amount, prompt) in actions {
            let slot = &mut leases[which];
            match (action, slot.as_mut()) {
                (7, _) => pools.reset(),
                (_, None) => {
                    let mut lease = pools.lease();
                    let known = lease.seek(&salts[prompt], &history(&prompts[prompt]), 20);
                    let end = lease.attach(&salts[prompt]);
                    prop_assert_eq!(end, known.pages * 4);
                    prop_assert_eq!(lease.held(1), known.pages);
                    lease.keep(amount / 4);
                    *slot = Some((lease, end, prompt));
                }
                (0..=2, Some((lease, end, prompt))) => {
                    let before = pools.used();
                    if *end + amount <= 120 && lease.grow(*end + amount) {
                        *end += amount;
                        lease.publish(&history(&prompts[*prompt]), *end);
                        lease.slide(*end);
                    } else {
                        prop_assert_eq!(pools.used(), before);
                    }
                }
                (3, Some((lease, end, prompt))) => {
                    lease.retire(&history(&prompts[*prompt]), *end);
                    *slot = None;
                }
                (4, Some((lease, end, _))) => {
                    lease.clear();
                    *end = 0;
                    prop_assert_eq!(lease.held(0) + lease.held(1), 0);
                    *slot = None;
                }
                (_, Some(_)) => *slot = None,
            }
            let held: Vec<_> = leases.iter().flatten().map(|(lease, _, _)| lease).collect();
            prop_assert_eq!(pools.check(held.iter().copied()), Ok(()));
            for (lease, end, _) in leases.iter().flatten() {
                for group in 0..2 {
                    for seen in pools.spec().first_visible(group, *end)..*end {
                        prop_assert!(lease.tables()[group].locate(seen, 4).is_some(), "{} of {}", seen, group);
                    }
                }
            }
        }
        drop(leases);
        prop_assert_eq!(pools.used(), vec![0, 0]);
        prop_assert_eq!(pools.check(std::iter::empty()), Ok(()));
        pools.reset();
        prop_assert_eq!(pools.kept(), vec![0, 0]);
        prop_assert_eq!(pools.check(std::iter::empty()), Ok(()));
    }
}
