-- The aggregator's database as version 0.1.0 wrote it (sqlite3's .dump). Every later version must read it.
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE enrolment (
	name VARCHAR(64) NOT NULL, 
	verify_key BLOB NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "enrolment" VALUES('a',X'000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F');
INSERT INTO "enrolment" VALUES('b',X'202122232425262728292A2B2C2D2E2F303132333435363738393A3B3C3D3E3F');
CREATE TABLE job_events (
	job_id VARCHAR(64) NOT NULL, 
	sequence INTEGER NOT NULL, 
	time VARCHAR(32) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	message TEXT NOT NULL, 
	detail TEXT, 
	PRIMARY KEY (job_id, sequence), 
	FOREIGN KEY(job_id) REFERENCES jobs (job_id)
);
INSERT INTO "job_events" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',1,'2025-06-01T12:00:01.000000Z','submitted','PENDING','submitted',NULL);
INSERT INTO "job_events" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',2,'2025-06-01T12:00:10.000000Z','started','RUNNING','started',NULL);
INSERT INTO "job_events" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',3,'2025-06-01T12:00:20.000000Z','round','RUNNING','round 1 was released','{"contributors": ["a", "b"], "number": 1, "released": true, "state": "RELEASED"}');
INSERT INTO "job_events" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',4,'2025-06-01T12:00:21.000000Z','succeeded','SUCCEEDED','the model and its manifest are ready','{"delta": 1e-05, "epsilon_example": 1.5, "epsilon_party": 2.5, "epsilon_party_against_aggregator": "inf", "files": [{"bytes": 4, "name": "model.safetensors", "sha256": "3b9c358f36f0a31b6ad3e14f309c7cf198ac9246e8316f9ce543d5b19ac02b80"}], "metrics": {"auc": 0.61}}');
INSERT INTO "job_events" VALUES('7c6e8c1cfc579aa385312e0ec0eab928',1,'2025-06-01T12:00:02.000000Z','submitted','PENDING','submitted',NULL);
INSERT INTO "job_events" VALUES('0c0a3f0832797134626def352ef54777',1,'2025-06-01T12:00:03.000000Z','submitted','PENDING','submitted',NULL);
INSERT INTO "job_events" VALUES('0c0a3f0832797134626def352ef54777',2,'2025-06-01T12:00:30.000000Z','failed','FAILED','party b sent nothing','{"message": "party b sent nothing", "parties": ["b"], "reason": "ROUND_FAILED", "stage": "collect"}');
CREATE TABLE jobs (
	job_id VARCHAR(64) NOT NULL, 
	request_id VARCHAR(100) NOT NULL, 
	owner VARCHAR(300) NOT NULL, 
	display_name TEXT NOT NULL, 
	spec TEXT NOT NULL, 
	spec_digest VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	started_at VARCHAR(32) NOT NULL, 
	ended_at VARCHAR(32) NOT NULL, 
	rounds_released INTEGER NOT NULL, 
	rounds_failed INTEGER NOT NULL, 
	error TEXT, 
	result TEXT, 
	PRIMARY KEY (job_id), 
	CONSTRAINT jobs_request UNIQUE (owner, request_id)
);
INSERT INTO "jobs" VALUES('5ba23c875f8cd6b695e6a994edbf8d85','request 1','scientist/s','job 1: Größe','{"encryption": {"resolution_bits": 16, "scheme": "paillier"}, "initial_model_sha256": "", "local_training": {"delta": 1e-05, "epsilon": 4.0, "learning_rate": 0.1, "max_grad_norm": 1.0, "sampling_rate": 0.05, "steps": 10}, "parties": ["a", "b"], "party_privacy": {"clipping_norm": 1.0, "delta": 1e-05, "noise_by": "both", "noise_multiplier": 0.1}, "quorum": 2, "round_timeout_s": 600.0, "rounds": 1, "seed": 0, "server_optimizer": {"learning_rate": 1.0, "momentum": null, "name": "fedavg"}, "spare_rounds": 2, "task": "randhie", "task_options": {}}','25daf30fbfa34a6d1f514f76d934020ac077f34f4159d7eadbe7820f8f4e36b3','SUCCEEDED','2025-06-01T12:00:01.000000Z','2025-06-01T12:00:10.000000Z','2025-06-01T12:00:21.000000Z',1,0,NULL,'{"delta": 1e-05, "epsilon_example": 1.5, "epsilon_party": 2.5, "epsilon_party_against_aggregator": "inf", "files": [{"bytes": 4, "name": "model.safetensors", "sha256": "3b9c358f36f0a31b6ad3e14f309c7cf198ac9246e8316f9ce543d5b19ac02b80"}], "metrics": {"auc": 0.61}}');
INSERT INTO "jobs" VALUES('7c6e8c1cfc579aa385312e0ec0eab928','request 2','scientist/s','job 2: Größe','{"encryption": {"resolution_bits": 16, "scheme": "paillier"}, "initial_model_sha256": "", "local_training": {"delta": 1e-05, "epsilon": 4.0, "learning_rate": 0.1, "max_grad_norm": 1.0, "sampling_rate": 0.05, "steps": 10}, "parties": ["a", "b"], "party_privacy": {"clipping_norm": 1.0, "delta": 1e-05, "noise_by": "both", "noise_multiplier": 0.1}, "quorum": 2, "round_timeout_s": 600.0, "rounds": 1, "seed": 0, "server_optimizer": {"learning_rate": 1.0, "momentum": null, "name": "fedavg"}, "spare_rounds": 2, "task": "randhie", "task_options": {}}','25daf30fbfa34a6d1f514f76d934020ac077f34f4159d7eadbe7820f8f4e36b3','PENDING','2025-06-01T12:00:02.000000Z','','',0,0,NULL,NULL);
INSERT INTO "jobs" VALUES('0c0a3f0832797134626def352ef54777','request 3','scientist/t','job 3: Größe','{"encryption": {"resolution_bits": 16, "scheme": "paillier"}, "initial_model_sha256": "", "local_training": {"delta": 1e-05, "epsilon": 4.0, "learning_rate": 0.1, "max_grad_norm": 1.0, "sampling_rate": 0.05, "steps": 10}, "parties": ["a", "b"], "party_privacy": {"clipping_norm": 1.0, "delta": 1e-05, "noise_by": "both", "noise_multiplier": 0.1}, "quorum": 2, "round_timeout_s": 600.0, "rounds": 1, "seed": 0, "server_optimizer": {"learning_rate": 1.0, "momentum": null, "name": "fedavg"}, "spare_rounds": 2, "task": "randhie", "task_options": {}}','25daf30fbfa34a6d1f514f76d934020ac077f34f4159d7eadbe7820f8f4e36b3','FAILED','2025-06-01T12:00:03.000000Z','','2025-06-01T12:00:30.000000Z',0,0,'{"message": "party b sent nothing", "parties": ["b"], "reason": "ROUND_FAILED", "stage": "collect"}',NULL);
CREATE TABLE ledger (
	sequence INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	line TEXT NOT NULL, 
	PRIMARY KEY (sequence), 
	UNIQUE (digest)
);
INSERT INTO "ledger" VALUES(1,'4a76546ff13cba0a25272e40b8bcf0dcf273ebfc74df00cdc29975dfe0717f28','{"at":"2025-06-01T12:00:11.000000Z","charged_rounds":1,"digest":"4a76546ff13cba0a25272e40b8bcf0dcf273ebfc74df00cdc29975dfe0717f28","event":{"dimension":1,"failure_probability":"0.0","noise_multiplier":"1.5","rounds":1,"tau":"0.0","type":"noisy_sum","version":1},"job_id":"5ba23c875f8cd6b695e6a994edbf8d85","kind":"reservation","previous":"0000000000000000000000000000000000000000000000000000000000000000","reason":"","reservation_id":"r1","round":1,"sequence":1,"subject":"federation:demo","unit":"party","version":1}');
INSERT INTO "ledger" VALUES(2,'0d22055d69d574c42613f621a5acdfc13bcbe3557e240cefed595eabd4242e89','{"at":"2025-06-01T12:00:20.000000Z","charged_rounds":0,"digest":"0d22055d69d574c42613f621a5acdfc13bcbe3557e240cefed595eabd4242e89","event":null,"job_id":"5ba23c875f8cd6b695e6a994edbf8d85","kind":"final","previous":"4a76546ff13cba0a25272e40b8bcf0dcf273ebfc74df00cdc29975dfe0717f28","reason":"","reservation_id":"r1","round":1,"sequence":2,"subject":"federation:demo","unit":"party","version":1}');
INSERT INTO "ledger" VALUES(3,'bb144c830e8d35256cd31ee64303e6f6248d9bcee60d7b911cab9c432e6fa222','{"at":"2025-06-01T12:00:31.000000Z","charged_rounds":1,"digest":"bb144c830e8d35256cd31ee64303e6f6248d9bcee60d7b911cab9c432e6fa222","event":{"noise_multiplier":"1.1","sampling_rate":"0.01","steps":4,"type":"dp_sgd_steps","version":1},"job_id":"7c6e8c1cfc579aa385312e0ec0eab928","kind":"reservation","previous":"0d22055d69d574c42613f621a5acdfc13bcbe3557e240cefed595eabd4242e89","reason":"","reservation_id":"r2","round":1,"sequence":3,"subject":"dataset:randhie","unit":"example","version":1}');
CREATE TABLE rounds (
	job_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	settled BOOLEAN NOT NULL, 
	content TEXT NOT NULL, 
	PRIMARY KEY (job_id, number)
);
INSERT INTO "rounds" VALUES('5ba23c875f8cd6b695e6a994edbf8d85',1,'RELEASED',1,'{"job_id": "5ba23c875f8cd6b695e6a994edbf8d85", "number": 1, "state": "RELEASED", "plan": {"statement": "{}", "signer": "aggregator", "signature": "00"}, "plan_digest": "64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525", "costs": {}, "model_sha256": "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4", "cohort": ["a", "b"], "quorum": 2, "holders": ["a", "b"], "threshold": 2, "noise_needed": true, "started_at": 1748779211.0, "timeout_s": 60.0, "ended_at": 1748779220.0, "roots": {}, "batches": {"a": {"header": "00", "sha256": "da4872822c4de0878eaad12e7d6224dae90ccf77adcdbb8a5dc8fc1dc1019ed7", "size": 7}}, "bytes_up": {}, "budgets": {}, "frozen_list": null, "contributors": ["a", "b"], "aggregate": {"header": "", "sha256": "a8792157cb4f27fb949c035f45518c61e884bb86e6f420204379c2baa8beb66e", "size": 7}, "aggregate_root": "4813494d137e1631bba301d5acab6e7bb7aa74ce1185d456565ef51d737677b2", "spent": true, "opening": null, "asked": [], "shares": {}, "failures": {}, "result": {"blobs": ["7186dde4a106af7241e121a9aca3e97fd4061d19f29eabffab1234e363055c85"], "epsilon_party": "inf"}, "reason": "", "settled": true}');
CREATE INDEX jobs_newest ON jobs (created_at, job_id);
CREATE INDEX jobs_state ON jobs (state, created_at);
CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_in_order BEFORE INSERT ON ledger WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence), 0) + 1 FROM ledger) BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
COMMIT;
