"""A Hub-compatible server on loopback: what the official clients need of the Hugging Face Hub, on one machine.

For tests, continuous integration, and air-gapped work of people who trust each other, with the real clients over real
HTTP. Connections are not encrypted, and nothing limits what a user stores. **Checked against the behaviour of the
clients (huggingface_hub 2.x, hf_xet 1.8, transformers 5, datasets 5), never against huggingface.co.**

Inside the scope, for `models` and `datasets`:

- users with tokens to read or to write, kept as hashes beside the store; organisations with members (`read`,
  `contributor`, `write`, `admin`), made by whoever first creates `org/name`; public, private and gated repositories;
- a user's namespace is written by that user; an organisation's repositories by its members with `write` or `admin`,
  and by a contributor who created them; its private ones are seen by all members;
- create, delete, move (with redirects), settings, info, lists, authorisation checks, access requests
  (`ask-access`, then by hand or at once);
- revisions by branch, tag, commit, `refs/pr/N`; trees, paths, refs, commits, branches, tags, super-squash;
- downloads with Range, entity tags and the `X-Repo-Commit` family, optionally redirected to a second port as to a CDN;
- the list of a repository's large files, and their deletion for good (without a rewrite of history);
- uploads: regular files, Git-LFS basic and multipart, Xet (checked: every xorb against its hash, every file against
  its sha256); commits with parent checks; pull requests and discussions, also by people without write access;
- git clone and fetch over HTTP with a name and a token, and downloads by git-lfs;
- pages for browsers under the addresses that clients print (`pages`);
- import and export of whole repositories, and a check of the store, also while a server runs (`control`);
- model cards: front matter checked by `validate-yaml` and at each commit, tags (`base_model:merge:...` included).

Outside it, answered by 501 with `X-Error-Code: NotImplemented`: spaces, kernels, buckets, collections, jobs, webhooks,
git push, Xet downloads (files are served by plain HTTP), copies of LFS files between repositories.

What is large is read through a Git-LFS pointer only if its object was sent to this very repository (`Hub._owned`); any
other pointer is an ordinary text. What lists tell of a repository is found out once a commit, checked, and kept.

Storage, under one folder that one server at a time may use: a bare git repository for each repository (readable by
`git`), a content-addressed store of sha256 objects, an SQLite file, and a second one for people, which the command
line may change while a server runs. Everything is written aside and renamed, and a branch moves last, so a server that
is killed leaves no half-written object and no half-made commit. Objects that no repository links any more go at the
next start, and so do the chunks received by Xet uploads (their place is then named anew, which tells clients to forget
what they believe is stored); until then they take space a second time, once for each user.
"""
