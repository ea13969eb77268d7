-- The party's database as version 0.1.0 wrote it (sqlite3's .dump). Every later version must read it.
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE ledger (
	sequence INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	line TEXT NOT NULL, 
	PRIMARY KEY (sequence), 
	UNIQUE (digest)
);
INSERT INTO "ledger" VALUES(1,'591bf988b9d2e557fd5995be6aec6fc432edeaaf44b2aad9884b9eae878d5058','{"at":"2025-06-01T12:00:11.000000Z","charged_rounds":1,"digest":"591bf988b9d2e557fd5995be6aec6fc432edeaaf44b2aad9884b9eae878d5058","event":{"noise_multiplier":"1.1","sampling_rate":"0.01","steps":4,"type":"dp_sgd_steps","version":1},"job_id":"5ba23c875f8cd6b695e6a994edbf8d85","kind":"reservation","previous":"0000000000000000000000000000000000000000000000000000000000000000","reason":"","reservation_id":"r1","round":1,"sequence":1,"subject":"dataset:randhie","unit":"example","version":1}');
INSERT INTO "ledger" VALUES(2,'e3261443fbd97649e602d746bd5af8b6fb87e4c89916e71db542dc03cbb5386b','{"at":"2025-06-01T12:00:20.000000Z","charged_rounds":0,"digest":"e3261443fbd97649e602d746bd5af8b6fb87e4c89916e71db542dc03cbb5386b","event":null,"job_id":"5ba23c875f8cd6b695e6a994edbf8d85","kind":"final","previous":"591bf988b9d2e557fd5995be6aec6fc432edeaaf44b2aad9884b9eae878d5058","reason":"","reservation_id":"r1","round":1,"sequence":2,"subject":"dataset:randhie","unit":"example","version":1}');
CREATE TABLE party_rounds (
	job_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	ended VARCHAR(16) NOT NULL, 
	content TEXT NOT NULL, 
	PRIMARY KEY (job_id, number)
);
INSERT INTO "party_rounds" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',1,'RELEASED','{"job_id": "5ba23c875f8cd6b695e6a994edbf8d85", "number": 1, "plan": "64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525", "stage": "DELIVERED", "batch": null, "root": {"statement": "{}", "signer": "a", "signature": "01"}, "list": "a330395cc0a53ad1207736546afff4735940937564bbf75ce1edad40780d9139", "aggregate_root": "4813494d137e1631bba301d5acab6e7bb7aa74ce1185d456565ef51d737677b2", "share": "c3bc45ac352fe43ff8f0a1cc26d6cc29f71f536dc417906f8513ea44ed4bb161", "ended": "RELEASED", "failure": ["", ""]}');
INSERT INTO "party_rounds" VALUES('7c6e8c1cfc579aa385312e0ec0eab928',1,'','{"job_id": "7c6e8c1cfc579aa385312e0ec0eab928", "number": 1, "plan": "6aba216a9cfad9614bd162394bdc5c09693a2112f5c2dbe8035b4de643eba8d1", "stage": "RESERVED", "batch": null, "root": null, "list": "", "aggregate_root": "", "share": "", "ended": "", "failure": ["", ""]}');
CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_in_order BEFORE INSERT ON ledger WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence), 0) + 1 FROM ledger) BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
COMMIT;
